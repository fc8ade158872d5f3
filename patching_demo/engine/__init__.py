"""Exact activation-patching sweeps, many patched runs at a time.

A plain sweep runs one whole forward pass per cell of its result. Nearly all of that work has a
known answer, because a causal decoder computes each position from earlier ones only, layer by
layer. Five ideas remove it, and each has a name here:

1. *Start at the layer*: a patch at layer l changes nothing before l, so a patched run starts
   from the corrupted run's residual stream there (:meth:`Front.enter`).
2. *Start at the position*: it changes nothing at earlier positions, whose keys and values come
   from the corrupted run (``start`` of a :class:`Cell`, ``prefix`` of a ``Layout``).
3. *Skip what agrees*: where clean and corrupted inputs are the same so far, or nothing that the
   metric reads comes later, a patch does nothing at all (:func:`reaching`).
4. *Read only what the metric reads*: logits are computed at its positions, and for its tokens if
   it names them (:class:`Scorer`).
5. *Pack*: the patched runs stand side by side in one sequence, under a mask that lets each see
   only itself and the shared prefix, and runs that start at later layers join the pack as it
   moves up through the blocks (:class:`Pack`, :class:`Front`).

None is an approximation, as long as a block computes the same for a token wherever it stands in
its input. That is proved on the model before any number is given (:func:`~.proof.prove`):
unpatched control runs stand where patched ones would, behind others, last in a full group, from
early and late positions; every block that the sweep uses, and the last one's shorter call, must
turn them into what the corrupted run has there, within rounding. (Before its next sweep, the same
model is proved again on some of its blocks.) Cells from the same places are then rechecked by plain
hooked forward passes. A model that fails either, or raises anything on the way, takes the plain
loop, and a warning says why.

Related work: the field's plain loop is ``transformer_lens.patching``; tree
masks over a shared prefix are known from speculative decoding (SpecInfer, Miao et al., 2024).
"""
