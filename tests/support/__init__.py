"""What the tests stand on: real QEMU (`qemu`) and the images it wrote for us (`images`).

QEMU is the judge, and a judge that borrows the defendant's code proves nothing: nothing here imports qcow2bm, but for
`recording`, which stands in for its file, `states`, which asks it, and `scenes`, which edits with it.
"""
