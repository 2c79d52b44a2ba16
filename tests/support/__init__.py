"""What the tests stand on: real QEMU (`qemu`) and the images it wrote for us (`images`).

Nothing here imports qcow2bm, but for `recording`, which stands in for its file, and `states`, which asks it. QEMU is the
judge, and a judge that borrows the defendant's code proves nothing.
"""
