"""Repairs: worked out on an overlay, judged there, and written as one plan.

What a repair is: `model` (policy, steps, plan), `workshop` (the image under repair), `runner` (the phases in order),
`session` (open, plan, commit).

The phases: `fields` (header), `rescue` and `listing` (bitmap directory), `snapshots`, `counts` (refcounts and leaks),
`apart` (clusters with two owners), `entries` (L1 and L2), `flags` (copied, dirty, corrupt), `revive` with `salvage` and
`evidence` (bitmaps that are in use or detached).

What only looks: `why` with `signs`, `concerns` and `ways_out`.

`as_qemu` is another engine on the same overlay: the repair of `qemu-img check -r`, exactly.
"""
