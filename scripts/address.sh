#!/usr/bin/env bash
# Set the repository's address in every file that names it: address.sh https://github.com/OWNER/NAME
set -euo pipefail
cd "$(dirname "$0")/.."

if ! [[ ${1:-} =~ ^https://github\.com/([A-Za-z0-9-]+)/([A-Za-z0-9._-]+)$ ]]; then
    echo "'${1:-}' is no address: make address URL=https://github.com/OWNER/NAME" >&2
    exit 2
fi
owner=${BASH_REMATCH[1]} name=${BASH_REMATCH[2]}
was=$(sed -n 's|^Repository = "https://github.com/\(.*\)"|\1|p' pyproject.toml)
old_site="${was%/*}.github.io/${was#*/}"
# The address itself, Colab's and Binder's form of it, and the book's site on GitHub Pages.
git ls-files -z | xargs -0 grep -lIZ -e "/$was" -e "$old_site" | xargs -0 sed -i \
    -e "s#\(github\.com\|github\|/gh\)/$was\b#\1/$owner/$name#g" -e "s#$old_site#$owner.github.io/$name#g"
git diff --stat
