"""The repair of `qemu-img check -r` (QEMU 7.2): the same words in the same order, the same clusters in the same places.

Wanted differences, where QEMU crashes or does harm:

- Internal snapshots are kept. QEMU writes the header as it opens an image whose bitmaps are sound or detached, or that
  has unknown autoclear bits, before it has read the snapshot table: `-r` then drops all snapshots and frees them.
- Sound bitmaps are not touched. QEMU marks them in use, and writes all of them anew in the end, into clusters that the
  refcounts it has not mended call free.
- Of the header only what has to change is written: marks, the places of tables, and a bitmaps extension that does not
  count. QEMU writes all of it anew. That shows where a broken table lies over the header.
- Clusters that are given back keep their content. QEMU punches them out of the file, be it what a damaged pointer has
  cut off, such as an encryption header.
- No L1 or L2 entry is mended in a cluster with another use, unless what stands there makes sense as a table
  (`shared.py`).
- For the sake of a refcount block outside the file that grows by its own length or 1 GiB; beyond that the refcounts are
  rebuilt, as on a file system that does not allow so large a file.
- The dirty bit stays while something is left that is worse than a leak, and so does the place of a snapshot table that
  cannot be read; QEMU clears both when it closes a dirty image.
- Where the autoclear bit says that there are bitmaps and there are none, QEMU takes every write for one to the bitmap
  directory, and marks the image corrupt; here it is repaired.
- Where tables lie over each other so often that the check is bounded, and so not all references are counted, nothing is
  repaired.
- Once QEMU has marked the image corrupt and gives it up, refcounts that it holds in memory are lost. Here all are, also
  those of more blocks than QEMU holds.
- Where the refcount table would have to grow for a new snapshot table, that is not written.
- `qemu-img bitmap` on a dirty image that cannot be repaired altogether is refused, and the image left as it is.
- References above what a refcount can hold are told when all are counted, not as they are met.
- The repair is written as a whole or not at all. On a block device a repair that needs a journal is refused.
"""
