"""THE table of problems: one row for everything a check can find, under a code that never changes.

`docs/problems.md` is generated from it. A new problem is a row here, a generator that yields it, a remedy, and a
fixture.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..format.faults import Fault
from .model import Finding, InQemu, Location, Problem, RepairClass, Severity

_CORRUPTION, _UNKNOWN, _BITMAP, _LEAK, _WARNING, _HINT = Severity
_LOSSLESS, _LOSSY, _GUESS, _NONE = RepairClass
_REFUSES, _FAILS, _ERROR, _COUNTS, _LEAKS, _SILENT = InQemu

# What to do, where several problems share it. What the repair does, and what that can cost, is in `remedies.py`.
_MEND = "`qcow2bm repair IMAGE` mends it and loses nothing"
_ZEROED = "nothing has to be done; `qcow2bm repair IMAGE` zeroes it"
_REFCOUNTS = (
    "start no VM before it is mended; `qcow2bm repair IMAGE` counts the references anew and loses nothing (`--dry-run` "
    "shows how)"
)
_GIVE_UP = (
    "the range named here needs a backup or the file system's own check; `qcow2bm repair IMAGE --allow lossy` gives up "
    "the bad pointer, and its undo file keeps it"
)
_SEE_GUESS = (
    "compare the range named here with a backup; `qcow2bm repair IMAGE --allow guess` makes it readable, and with "
    "--dry-run it shows how first"
)
_SNAPSHOTS = (
    "run no `qemu-img check -r` while the snapshots matter: what they pointed to is probably still in the file; copy "
    "it, then `qcow2bm repair IMAGE --allow lossy --only snapshots` drops those that cannot be used"
)
_HEADER = (
    "save the first cluster, then correct this one field (`qcow2bm dump --structure header` shows where it is); put no "
    "older header back whole: tables may have moved since"
)
_DIRECTORY = (
    "`qcow2bm repair IMAGE --only bitmaps` keeps all bitmaps that can be read and takes out the rest, and QEMU opens "
    "the image again; a bitmap that is missing after that needs a full backup"
)
_QUARANTINE = (
    "`qcow2bm repair IMAGE --only bitmaps` takes this one bitmap out, and QEMU opens the image again; start a new one "
    "with a full backup"
)
_VOID = (
    "start no VM and run no `qemu-img check -r`; `qcow2bm repair IMAGE --only bitmaps` takes this bitmap out; "
    "take a full backup next"
)
_FIND_FIRST = (
    "change nothing and run no `qemu-img check -r`; copy the image: what this pointed to is probably still in the file"
)
_NOTHING = "nothing has to be done"

# What it means, where several problems share it.
_NO_START = "QEMU refuses the image, so the VM does not start"
_NO_START_FOR_BITMAP = "QEMU refuses the whole image because of this one bitmap, so the VM does not start"
_NO_START_FOR_BITMAPS = "QEMU refuses the whole image because of its bitmaps, so the VM does not start"
_OVERWRITE = "QEMU may give the cluster away again: the next write can overwrite what is there"
_GARBAGE = "the guest reads wrong data or an error there"
_LETTER = "nothing today: QEMU does not look at it"


_ROWS = (
    # header
    Problem(
        "header-cluster-bits", _CORRUPTION, _NONE, _REFUSES, "impossible cluster size",
        _NO_START,
        _HEADER,
    ),
    Problem(
        "header-length", _CORRUPTION, _NONE, _REFUSES, "impossible header length",
        _NO_START,
        _HEADER,
    ),
    Problem(
        "header-length-odd", _CORRUPTION, _NONE, _SILENT, "header length is not a multiple of 8",
        "header extensions are read from the wrong place",
        _HEADER,
        hides=True,
    ),
    Problem(
        "header-refcount-order", _CORRUPTION, _NONE, _REFUSES, "impossible refcount width",
        _NO_START,
        _HEADER,
    ),
    Problem(
        "header-padding", _WARNING, _LOSSLESS, _SILENT, "the header's padding is not zero",
        "a later version of the format may read meaning into it",
        _ZEROED,
    ),
    Problem(
        "unknown-incompatible", _UNKNOWN, _NONE, _REFUSES, "unknown incompatible feature bits",
        "a newer program wrote the image, or the bits are damage: nobody here can judge it",
        "use the program that made it, or restore the header from a copy",
    ),
    Problem(
        "unknown-autoclear", _WARNING, _LOSSY, _SILENT, "unknown autoclear feature bits",
        "the next writer that does not know them clears them, and what they vouch for is void",
        "use the program that made the image; `qcow2bm repair IMAGE --allow lossy` clears the bits, as any writer must",
        hides=True,
    ),
    Problem(
        "marked-dirty", _WARNING, _LOSSLESS, _SILENT, "the image is marked dirty",
        "its last writer did not close it: with lazy refcounts the counts on disk may be too low",
        "nothing has to be done: the next writer brings the refcounts up to date, and so does `qcow2bm repair IMAGE`",
    ),
    Problem(
        "marked-corrupt", _CORRUPTION, _LOSSLESS, _SILENT, "the image is marked corrupt",
        "QEMU noticed damage and refuses to write to the image, so the VM does not start",
        "start no VM; `qcow2bm repair IMAGE` mends what it finds and clears the mark if no corruption is left",
    ),
    Problem(
        "change-cut-short", _CORRUPTION, _GUESS, _REFUSES, "a crash has cut a change of qcow2bm short",
        (
            "part of the image is old and part is new: nothing else that is found can be relied on; an incompatible "
            "feature bit that nobody knows keeps QEMU and all others out until it is settled"
        ),
        (
            "find the journal, `NAME.qcow2bm-journal` by the name that the image had then, or the file of --undo: "
            "`qcow2bm undo IMAGE FILE` puts everything back. Only if it is lost: `qcow2bm repair IMAGE --allow guess`"
        ),
        hides=True,
    ),
    Problem(
        "compression-type-unknown", _UNKNOWN, _NONE, _REFUSES, "unknown compression type",
        _NO_START,
        _HEADER,
    ),
    Problem(
        "compression-type-bit", _CORRUPTION, _GUESS, _REFUSES, "compression type and feature bit disagree",
        _NO_START,
        "`qcow2bm repair IMAGE --allow guess` sets the bit as the type says; then see whether the data can be read",
    ),
    Problem(
        "extended-l2-cluster-size", _CORRUPTION, _NONE, _REFUSES, "clusters too small for extended L2 entries",
        _NO_START,
        _HEADER,
    ),
    Problem(
        "backing-name-offset", _CORRUPTION, _NONE, _REFUSES, "backing file name outside the first cluster",
        _NO_START,
        "write the name again with `qemu-img rebase -u` on a copy whose field is corrected",
    ),
    Problem(
        "backing-name-length", _CORRUPTION, _NONE, _REFUSES, "backing file name too long",
        _NO_START,
        _HEADER,
    ),
    Problem(
        "backing-name-overlap", _CORRUPTION, _NONE, _SILENT, "backing file name within the header",
        "the backing file's name is header bytes: the disk has lost what lies below it",
        _HEADER,
    ),
    Problem(
        "l1-size", _CORRUPTION, _NONE, _REFUSES, "L1 table above 32 MiB",
        _NO_START,
        (
            "compare size and l1_size with what the VM had; correct the one that is wrong: a larger l1_size reads"
            " foreign bytes as mapping"
        ),
        hides=True,
    ),
    Problem(
        "l1-offset", _CORRUPTION, _NONE, _REFUSES, "impossible offset of the L1 table",
        _NO_START,
        _HEADER,
        hides=True,
    ),
    Problem(
        "l1-too-small", _CORRUPTION, _NONE, _REFUSES, "L1 table shorter than the virtual size needs",
        _NO_START,
        (
            "compare size and l1_size with what the VM had, and with the tables of bitmaps, which are as long as the "
            "disk needs; correct the one that is wrong: a larger l1_size reads foreign bytes as mapping"
        ),
        hides=True,
    ),
    Problem(
        "refcount-table-missing", _CORRUPTION, _LOSSLESS, _SILENT, "no refcount table",
        "QEMU refuses to start a VM from it: nothing says which clusters are used",
        _REFCOUNTS,
    ),
    Problem(
        "refcount-table-size", _CORRUPTION, _LOSSLESS, _REFUSES, "refcount table above 8 MiB",
        _NO_START,
        _REFCOUNTS,
    ),
    Problem(
        "refcount-table-offset", _CORRUPTION, _LOSSLESS, _REFUSES, "impossible offset of the refcount table",
        _NO_START,
        _REFCOUNTS,
    ),
    # header extensions
    Problem(
        "extension-too-long", _CORRUPTION, _NONE, _REFUSES, "a header extension longer than its room",
        _NO_START + "; what comes after it is unknown",
        _HEADER,
        hides=True,
    ),
    Problem(
        "extension-duplicate", _WARNING, _NONE, _SILENT, "a header extension that is there twice",
        "which of them counts depends on the program",
        _HEADER,
    ),
    Problem(
        "extension-padding", _WARNING, _LOSSLESS, _SILENT, "padding of a header extension is not zero",
        _LETTER,
        _ZEROED,
    ),
    Problem(
        "backing-format-length", _CORRUPTION, _NONE, _REFUSES, "backing format name too long",
        _NO_START,
        "`qemu-img rebase -u -F` on a copy whose extension is corrected",
    ),
    # encryption
    Problem(
        "encryption-method", _CORRUPTION, _NONE, _REFUSES, "unknown encryption method",
        _NO_START,
        _HEADER,
        hides=True,
    ),
    Problem(
        "encryption-extension-missing", _CORRUPTION, _NONE, _REFUSES, "encrypted, but no encryption header pointer",
        _NO_START + "; without the encryption header all data is lost",
        _FIND_FIRST + " (a LUKS header begins with the bytes `LUKS` and 0xBABE)",
        hides=True,
    ),
    Problem(
        "encryption-extension-unexpected", _CORRUPTION, _NONE, _REFUSES,
        "an encryption header pointer in an image that is not encrypted",
        _NO_START,
        "if `LUKS` stands at the offset that it names, the method in the header is the damage: clear nothing",
    ),
    Problem(
        "encryption-extension-length", _CORRUPTION, _NONE, _REFUSES,
        "encryption header pointer of the wrong length",
        _NO_START,
        _HEADER,
        hides=True,
    ),
    Problem(
        "encryption-header-offset", _CORRUPTION, _NONE, _REFUSES, "impossible offset of the encryption header",
        _NO_START,
        _HEADER,
        hides=True,
    ),
    Problem(
        "encryption-header-size", _CORRUPTION, _NONE, _REFUSES, "impossible size of the encryption header",
        _NO_START,
        _HEADER,
        hides=True,
    ),
    Problem(
        "encryption-header-outside", _CORRUPTION, _NONE, _COUNTS, "encryption header outside the file",
        "without it no data can be decrypted",
        _FIND_FIRST + " (a LUKS header begins with the bytes `LUKS` and 0xBABE)",
        hides=True,
    ),
    Problem(
        "encryption-header-magic", _CORRUPTION, _NONE, _REFUSES, "the encryption header is no LUKS header",
        "without it no data can be decrypted",
        "restore the LUKS header from a copy of it",
        hides=True,
    ),
    Problem(
        "encryption-header-damaged", _CORRUPTION, _NONE, _REFUSES, "damaged encryption header, or cut short",
        _NO_START + ", with any key or with one of them; without the encryption header no data can be decrypted",
        (
            "run no `qemu-img check -r`, which frees what the image no longer names of the header; if key material is "
            "cut off correct the length (`qcow2bm dump --structure extensions` shows where it is), else restore the "
            "LUKS header from a copy of it"
        ),
        hides=True,
    ),
    # external data file
    Problem(
        "data-file-name-missing", _WARNING, _NONE, _REFUSES, "external data file without a name",
        "QEMU opens the image only when the data file is named on the command line",
        (
            "name it on the command line: `--image-opts driver=qcow2,file.filename=IMAGE,data-"
            "file.driver=file,data-file.filename=DATA`"
        ),
    ),
    Problem(
        "data-file-name-unused", _WARNING, _NONE, _SILENT, "a data file name in an image without data file",
        "nothing, if the image never had a data file; else the bit that says so is lost, and with it all data",
        "make sure that the image never had a data file",
    ),
    Problem(
        "data-file-raw-without-file", _CORRUPTION, _NONE, _REFUSES, "raw data file flag without a data file",
        _NO_START,
        "make sure that the image never had a data file; the bit that says so may be what is lost",
    ),
    Problem(
        "data-file-raw-offset", _CORRUPTION, _NONE, _SILENT,
        "a cluster of a raw data file that is not at its guest offset",
        "whoever reads the data file as raw sees other data there than the guest",
        "read the data file as raw no more; `qemu-img convert` makes a new image of what the guest sees",
    ),
    Problem(
        "data-file-snapshots", _CORRUPTION, _LOSSY, _COUNTS, "internal snapshots beside an external data file",
        "snapshots cannot keep data that lies in the data file",
        (
            "copy both files; `qcow2bm repair IMAGE --allow lossy` drops the snapshots, which QEMU cannot delete, and "
            "leaves the disk as it is"
        ),
    ),
    # snapshots
    Problem(
        "snapshot-count", _CORRUPTION, _LOSSY, _FAILS, "too many internal snapshots",
        _NO_START + "; the snapshots could not be checked",
        _SNAPSHOTS,
        hides=True,
    ),
    Problem(
        "snapshot-table-offset", _CORRUPTION, _LOSSY, _FAILS, "impossible offset of the snapshot table",
        _NO_START + "; the snapshots could not be checked",
        (
            "if there are no snapshots, `qcow2bm repair IMAGE --allow lossy` clears the field; otherwise it drops them "
            "all: save the first cluster and correct the field (`qcow2bm dump --structure header` shows where it is)"
        ),
        hides=True,
    ),
    Problem(
        "snapshot-table-size", _CORRUPTION, _LOSSY, _FAILS, "snapshot table above 64 MiB",
        _NO_START + "; the snapshots after this one could not be checked",
        _SNAPSHOTS,
        hides=True,
    ),
    Problem(
        "snapshot-extra-data-size", _CORRUPTION, _LOSSY, _FAILS, "too much extra data in a snapshot table entry",
        _NO_START + "; the snapshots from this one on could not be checked",
        (
            "`qcow2bm repair IMAGE --allow lossy --only snapshots` cuts the extra data to 1024 bytes; what programs of "
            "today know lies in the first 24"
        ),
        hides=True,
    ),
    Problem(
        "snapshot-table-outside", _CORRUPTION, _LOSSY, _COUNTS, "snapshot table outside the file",
        "the snapshots are lost; the disk itself is not concerned",
        _SNAPSHOTS,
        hides=True,
    ),
    Problem(
        "snapshot-incomplete", _CORRUPTION, _LOSSLESS, _COUNTS, "snapshot table entry without its extra data",
        "version 3 needs the disk size there: a snapshot of a resized disk could not be applied",
        _MEND,
    ),
    Problem(
        "snapshot-id", _WARNING, _LOSSLESS, _SILENT, "two snapshots with the same id, or one without",
        "commands that take an id reach only the first of them",
        "nothing has to be done: use the name; `qcow2bm repair IMAGE` gives it an id of its own",
    ),
    Problem(
        "snapshot-l1-unaligned", _CORRUPTION, _LOSSY, _COUNTS, "L1 table of a snapshot is not aligned",
        "the snapshot is lost, and its clusters look like leaks",
        _SNAPSHOTS,
        hides=True,
    ),
    Problem(
        "snapshot-l1-size", _CORRUPTION, _LOSSY, _COUNTS, "L1 table of a snapshot is above 32 MiB",
        "the snapshot is lost, and its clusters look like leaks",
        _SNAPSHOTS,
        hides=True,
    ),
    Problem(
        "snapshot-l1-too-small", _CORRUPTION, _LOSSY, _SILENT, "L1 table of a snapshot shorter than its disk",
        "the snapshot has lost the end of its disk",
        (
            "do not apply it; read what is left with `qemu-img convert -l`, then `qcow2bm repair IMAGE --allow lossy "
            "--only snapshots` drops it"
        ),
        hides=True,
    ),
    Problem(
        "snapshot-l1-outside", _CORRUPTION, _LOSSY, _COUNTS, "L1 table of a snapshot outside the file",
        "the snapshot is lost; the disk itself is not concerned",
        _SNAPSHOTS,
        hides=True,
    ),
    Problem(
        "snapshot-l1-excessive", _CORRUPTION, _NONE, _SILENT, "L1 tables larger than the file that holds them",
        "the snapshots overlap each other; the rest of them could not be checked",
        _FIND_FIRST,
        hides=True,
    ),
    # refcount structures
    Problem(
        "refcount-table-outside", _CORRUPTION, _LOSSLESS, _COUNTS, "refcount table outside the file",
        _OVERWRITE,
        _REFCOUNTS,
    ),
    Problem(
        "refcount-block-reserved", _CORRUPTION, _LOSSLESS, _COUNTS, "reserved bits in a refcount table entry",
        "the refcounts below it are not to be trusted: " + _OVERWRITE,
        _REFCOUNTS,
    ),
    Problem(
        "refcount-block-unaligned", _CORRUPTION, _LOSSLESS, _COUNTS, "a refcount block that is not aligned",
        "its refcounts cannot be read, and QEMU marks the image corrupt when it needs them",
        _REFCOUNTS,
    ),
    Problem(
        "refcount-block-outside", _CORRUPTION, _LOSSLESS, _COUNTS, "a refcount block outside the file",
        _OVERWRITE,
        _REFCOUNTS,
    ),
    Problem(
        "refcount-block-shared", _CORRUPTION, _LOSSLESS, _COUNTS, "a refcount block that something else uses too",
        "a write to one destroys the other",
        _REFCOUNTS,
        hides=True,
    ),
    Problem(
        "refcount-unreadable", _CORRUPTION, _LOSSLESS, _ERROR, "refcounts that cannot be read",
        "QEMU cannot write there",
        _REFCOUNTS,
    ),
    # mapping
    Problem(
        "l1-outside", _CORRUPTION, _NONE, _COUNTS, "active L1 table outside the file",
        "the mapping of the disk is lost: the guest reads zeroes",
        _FIND_FIRST,
        hides=True,
    ),
    Problem(
        "l1-entry-reserved", _CORRUPTION, _GUESS, _COUNTS, "reserved bits in an L1 entry",
        "the entry is not what was written: " + _GARBAGE,
        _SEE_GUESS,
        hides=True,
    ),
    Problem(
        "l1-entry-no-table", _CORRUPTION, _LOSSLESS, _COUNTS, "an L1 entry with flags and no L2 table",
        "the guest reads as if nothing were mapped; at the first write there QEMU ends with a failed assertion",
        _MEND,
    ),
    Problem(
        "l2-unaligned", _CORRUPTION, _LOSSY, _COUNTS, "an L2 table that is not aligned",
        _GARBAGE,
        _GIVE_UP,
        hides=True,
    ),
    Problem(
        "l2-outside", _CORRUPTION, _LOSSY, _COUNTS, "an L2 table outside the file",
        _GARBAGE,
        _GIVE_UP,
        hides=True,
    ),
    Problem(
        "l2-entry-reserved", _CORRUPTION, _GUESS, _COUNTS, "reserved bits in an L2 entry",
        "the entry is not what was written: " + _GARBAGE,
        _SEE_GUESS,
        hides=True,
    ),
    Problem(
        "data-unaligned", _CORRUPTION, _LOSSY, _COUNTS, "a data cluster that is not aligned",
        _GARBAGE,
        _GIVE_UP,
        hides=True,
    ),
    Problem(
        "zero-unaligned", _CORRUPTION, _LOSSY, _COUNTS, "a preallocated zero cluster that is not aligned",
        "the entry is not what was written, and QEMU fails whatever the guest reads or writes there",
        _GIVE_UP,
    ),
    Problem(
        "data-outside", _CORRUPTION, _LOSSY, _COUNTS, "a data cluster outside the file",
        _GARBAGE,
        _GIVE_UP,
        hides=True,
    ),
    Problem(
        "zero-flag-reserved", _CORRUPTION, _GUESS, _SILENT, "a zero flag where the format has none",
        "version 2 and extended L2 entries have no such flag: programs differ in what the guest reads",
        _SEE_GUESS,
        hides=True,
    ),
    Problem(
        "compressed-copied", _CORRUPTION, _LOSSLESS, _COUNTS, "a compressed cluster with the copied flag",
        "a write there could overwrite other compressed clusters",
        "`qcow2bm repair IMAGE` clears the flag; `qemu-img check -r all` does not mend this",
    ),
    Problem(
        "compressed-outside", _CORRUPTION, _LOSSY, _COUNTS, "a compressed cluster outside the file",
        _GARBAGE,
        _GIVE_UP,
        hides=True,
    ),
    Problem(
        "compressed-data-file", _CORRUPTION, _LOSSY, _COUNTS, "a compressed cluster beside an external data file",
        _GARBAGE,
        _GIVE_UP,
    ),
    Problem(
        "compressed-subclusters", _CORRUPTION, _GUESS, _COUNTS, "a compressed cluster with a subcluster bitmap",
        _GARBAGE,
        _SEE_GUESS,
        hides=True,
    ),
    Problem(
        "subclusters-contradict", _CORRUPTION, _GUESS, _COUNTS, "subclusters that are both allocated and zero",
        _GARBAGE,
        _SEE_GUESS,
    ),
    Problem(
        "subclusters-unallocated", _CORRUPTION, _LOSSY, _COUNTS, "allocated subclusters without a host cluster",
        _GARBAGE,
        _GIVE_UP,
        hides=True,
    ),
    Problem(
        "mapping-past-end", _WARNING, _NONE, _SILENT, "clusters mapped past the end of the disk",
        "space that the guest cannot reach; it shows again if the disk grows",
        _NOTHING,
    ),
    Problem(
        "clusters-shared", _CORRUPTION, _LOSSLESS, _SILENT, "one host cluster for two places of the guest",
        "a write to one place of the disk shows at the other, and one of them has lost its data already",
        (
            "start no VM and run no `qemu-img check -r`, which accepts the sharing; `qcow2bm repair IMAGE` gives each "
            "place a copy of its own; then find out with the guest's tools which of them is right"
        ),
        hides=True,
    ),
    Problem(
        "metadata-overlap", _CORRUPTION, _LOSSLESS, _SILENT, "one cluster with two uses, at least one of them metadata",
        "the guest can overwrite the image's own tables, or a table the guest's data",
        (
            "start no VM and run no `qemu-img check -r`, which accepts the sharing; `qcow2bm repair IMAGE` copies "
            "apart what can be moved, and both read what they read today; then find out which of the owners is right"
        ),
        hides=True,
    ),
    # refcounts and flags
    Problem(
        "refcount-too-low", _CORRUPTION, _LOSSLESS, _COUNTS, "refcount below the references",
        _OVERWRITE,
        _REFCOUNTS,
    ),
    Problem(
        "refcount-overflow", _CORRUPTION, _NONE, _COUNTS, "more references than a refcount can hold",
        _OVERWRITE,
        "on a copy: `qemu-img amend -o refcount_bits=` with the next wider width, then `qcow2bm repair` on that",
    ),
    Problem(
        "leak", _LEAK, _LOSSLESS, _LEAKS, "leaked clusters",
        "wasted space, no harm to data",
        "`qcow2bm repair IMAGE --only leaks` gives the space back",
    ),
    Problem(
        "leak-unproven", _LEAK, _GUESS, _LEAKS, "unreferenced clusters while part of the image cannot be followed",
        (
            "they may be what the damage named above has cut off: a table, guest data, a snapshot, the encryption"
            " header"
        ),
        (
            "run no `qemu-img check -r`, which frees them for good; settle the other findings (`qcow2bm repair "
            "IMAGE`), then check again; what is left then is freed with `--allow guess`"
        ),
    ),
    Problem(
        "leak-doubtful", _LEAK, _GUESS, _LEAKS, "leaked clusters of which something says that they may be none",
        (
            "all of the image can be read, and still they may have been cut off: a wrong field of the header, a lost"
            " table or snapshot, or damage that was mended before, looks like this; the finding says what speaks for it"
        ),
        (
            "run no `qemu-img check -r`, which frees them for good; see that the guest and the snapshots miss nothing,"
            " or look for the field that is wrong (`qcow2bm dump --structure header`); `qcow2bm repair IMAGE --allow "
            "guess --only leaks` gives the space back"
        ),
    ),
    Problem(
        "leak-lost-table", _LEAK, _GUESS, _LEAKS, "leaked clusters that look like a lost L2 table and its data",
        (
            "a table that maps them is there, but nothing refers to it any more: the guest may have lost what lies in"
            " them"
        ),
        (
            "run no `qemu-img check -r`, which frees them for good; look for what the guest misses first, with a copy "
            "of the image; `qcow2bm repair IMAGE --allow guess --only leaks` gives the space back"
        ),
    ),
    Problem(
        "leak-detached-bitmap", _LEAK, _LOSSY, _LEAKS, "leaked clusters of detached bitmaps",
        "the next writer of the image drops the bitmaps they belong to; then they are plain leaks",
        (
            "let no `qemu-img check -r` run and start no VM while the bitmaps may be wanted (`qcow2bm why IMAGE "
            "BITMAP` says how to bring one back); `qcow2bm repair IMAGE --detached remove --allow lossy` frees them"
        ),
    ),
    Problem(
        "leak-lost-bitmap", _LEAK, _LOSSY, _LEAKS, "leaked clusters that look like a lost bitmap",
        "a bitmap directory nothing refers to: `amend -o compat=0.10` or a foreign writer dropped the bitmaps",
        (
            "let no `qemu-img check -r` run while the bitmap may be wanted; after that `qcow2bm repair IMAGE --allow "
            "lossy --only leaks` gives the space back"
        ),
    ),
    Problem(
        "copied-l1", _CORRUPTION, _LOSSLESS, _COUNTS, "copied flag of an L1 entry contradicts the refcount",
        "a write may go to a table that a snapshot shares, or copy one needlessly",
        _MEND,
    ),
    Problem(
        "copied-l2", _CORRUPTION, _LOSSLESS, _COUNTS, "copied flag of an L2 entry contradicts the refcount",
        "a write may go to a cluster that a snapshot shares, or copy one needlessly",
        _MEND,
    ),
    # extension and directory of bitmaps
    Problem(
        "bitmaps-extension-missing", _CORRUPTION, _LOSSLESS, _SILENT, "bitmaps are announced, but there are none",
        (
            "QEMU takes its writes for such to a bitmap directory: the first one that needs a new cluster fails, and "
            "QEMU marks the image corrupt; the disk is there still, but bitmaps that there were are lost"
        ),
        "start no VM; `qcow2bm repair IMAGE` clears the flag, which loses nothing; then take a full backup with a new "
        "bitmap",
    ),
    Problem(
        "bitmaps-extension-length", _BITMAP, _LOSSLESS, _REFUSES, "bitmaps extension of the wrong length",
        _NO_START_FOR_BITMAPS,
        _DIRECTORY,
        hides=True,
    ),
    Problem(
        "bitmaps-extension-reserved", _BITMAP, _LOSSLESS, _REFUSES,
        "a reserved field of the bitmaps extension is set",
        _NO_START_FOR_BITMAPS,
        "`qcow2bm repair IMAGE --only bitmaps` clears the field, and all bitmaps stay as they are",
    ),
    Problem(
        "bitmaps-count", _BITMAP, _LOSSLESS, _REFUSES, "impossible number of bitmaps",
        _NO_START_FOR_BITMAPS,
        _DIRECTORY,
        hides=True,
    ),
    Problem(
        "bitmap-directory-size", _BITMAP, _LOSSLESS, _REFUSES, "impossible size of the bitmap directory",
        _NO_START_FOR_BITMAPS,
        _DIRECTORY,
        hides=True,
    ),
    Problem(
        "bitmap-directory-offset", _BITMAP, _LOSSLESS, _REFUSES, "impossible offset of the bitmap directory",
        _NO_START_FOR_BITMAPS,
        _DIRECTORY,
        hides=True,
    ),
    Problem(
        "bitmap-directory-outside", _BITMAP, _LOSSLESS, _REFUSES, "bitmap directory outside the file",
        _NO_START_FOR_BITMAPS,
        _DIRECTORY,
        hides=True,
    ),
    Problem(
        "bitmap-directory-entries", _BITMAP, _LOSSLESS, _REFUSES, "the bitmap directory does not hold its entries",
        _NO_START_FOR_BITMAPS,
        _DIRECTORY,
        hides=True,
    ),
    # directory entries of bitmaps
    Problem(
        "bitmap-table-offset", _BITMAP, _LOSSLESS, _REFUSES, "impossible offset of a bitmap table",
        _NO_START_FOR_BITMAP,
        _QUARANTINE,
        hides=True,
    ),
    Problem(
        "bitmap-table-size", _BITMAP, _LOSSLESS, _REFUSES, "bitmap table of the wrong size for the disk",
        _NO_START_FOR_BITMAP,
        "if it is so with every bitmap, first compare the size of the disk with what the VM had: that field may be the "
        "damage; else `qcow2bm resize IMAGE SIZE` with the size that the disk has makes the bitmap fit it, what its "
        "table did not cover being dirty; or " + _QUARANTINE,
        hides=True,
    ),
    Problem(
        "bitmap-flags", _BITMAP, _LOSSLESS, _REFUSES, "unknown flags of a bitmap",
        _NO_START_FOR_BITMAP,
        _QUARANTINE,
    ),
    Problem(
        "bitmap-type", _BITMAP, _LOSSLESS, _REFUSES, "unknown type of a bitmap",
        _NO_START_FOR_BITMAP,
        _QUARANTINE,
    ),
    Problem(
        "bitmap-name", _BITMAP, _LOSSLESS, _REFUSES, "impossible name of a bitmap",
        "a bitmap without a name cannot be addressed; one with a too long name makes QEMU refuse the image",
        "`qcow2bm repair IMAGE --only bitmaps` names it and keeps its bits; one with a too long name it takes out",
    ),
    Problem(
        "bitmap-name-duplicate", _BITMAP, _LOSSLESS, _REFUSES, "two bitmaps with the same name",
        _NO_START_FOR_BITMAP,
        "`qcow2bm repair IMAGE --only bitmaps` renames the second one, its bits stay: look at both with `qcow2bm list`",
    ),
    Problem(
        "bitmap-extra-data", _BITMAP, _LOSSLESS, _REFUSES, "extra data of a bitmap that is not known",
        "only the program that wrote it may touch the bitmap; QEMU refuses the whole image",
        "use the program that wrote it, or: " + _QUARANTINE,
    ),
    Problem(
        "bitmap-extra-data-compatible", _BITMAP, _LOSSLESS, _REFUSES, "extra data of a bitmap that QEMU refuses",
        "the specification allows it, but " + _NO_START_FOR_BITMAP,
        _QUARANTINE,
    ),
    Problem(
        "bitmap-granularity", _BITMAP, _LOSSLESS, _REFUSES, "impossible granularity of a bitmap",
        _NO_START_FOR_BITMAP,
        _QUARANTINE,
    ),
    Problem(
        "bitmap-padding", _WARNING, _LOSSLESS, _SILENT, "padding of a bitmap directory entry is not zero",
        _LETTER,
        _ZEROED,
    ),
    # table and data of bitmaps
    Problem(
        "bitmap-table-outside", _CORRUPTION, _LOSSLESS, _COUNTS, "bitmap table outside the file",
        (
            "as the file grows guest data comes to lie there, and QEMU frees it when it closes the image; and the "
            "bitmap reads as clean: the next incremental backup would miss what it held"
        ),
        _VOID,
        hides=True,
    ),
    Problem(
        "bitmap-tables-excessive", _CORRUPTION, _LOSSLESS, _SILENT,
        "bitmap tables larger than the file that holds them",
        (
            "the tables overlap each other, or what comes after the file's end; the rest of them could not be checked, "
            "and QEMU frees what bitmaps name whenever it closes the image"
        ),
        "start no VM; `qcow2bm repair IMAGE --only bitmaps` takes these bitmaps out; take a full backup next",
        hides=True,
    ),
    Problem(
        "bitmap-entry-reserved", _BITMAP, _LOSSLESS, _REFUSES, "reserved bits in a bitmap table entry",
        _NO_START_FOR_BITMAP,
        _QUARANTINE,
        hides=True,
    ),
    Problem(
        "bitmap-entry-all-ones", _BITMAP, _LOSSLESS, _REFUSES,
        "a bitmap table entry with an offset and the all-ones bit",
        _NO_START_FOR_BITMAP,
        _QUARANTINE,
        hides=True,
    ),
    Problem(
        "bitmap-entry-unaligned", _BITMAP, _LOSSLESS, _REFUSES, "a bitmap table entry that is not aligned",
        _NO_START_FOR_BITMAP,
        _QUARANTINE,
        hides=True,
    ),
    Problem(
        "bitmap-data-outside", _CORRUPTION, _LOSSLESS, _COUNTS, "bitmap data outside the file",
        (
            "as the file grows guest data comes to lie there, and QEMU frees it when it closes the image; and those "
            "bits read as clean: the next incremental backup would miss what they held"
        ),
        _VOID,
        hides=True,
    ),
    Problem(
        "bitmap-clusters-shared", _CORRUPTION, _LOSSLESS, _SILENT, "a cluster of a bitmap that something else uses too",
        "QEMU frees and rewrites bitmap clusters at every close: it would overwrite the other owner",
        (
            "start no VM and run no `qemu-img check -r`, which accepts the sharing; `qcow2bm repair IMAGE --only "
            "bitmaps` leaves the cluster to the other owner: bits that lay in it count as dirty"
        ),
        hides=True,
    ),
    Problem(
        "bitmap-clusters-uncounted", _CORRUPTION, _LOSSLESS, _SILENT, "a cluster of a bitmap that nobody counts",
        (
            "other clusters are counted and not referred to, so an entry may name the wrong one: the bits may be no "
            "bits, and QEMU may give the cluster away again"
        ),
        (
            "start no VM; `qcow2bm repair IMAGE --only bitmaps` makes the bits in such a cluster count as dirty, and "
            "what may have been meant is not given back"
        ),
    ),
    Problem(
        "bitmap-tail-bits", _WARNING, _LOSSLESS, _SILENT, "bits set past the end of the disk",
        _LETTER,
        _ZEROED,
    ),
    Problem(
        "bitmap-needless-clusters", _HINT, _NONE, _SILENT,
        "data clusters of a bitmap that say all zero or all one",
        "wasted space: the table itself could say so",
        _NOTHING,
    ),
    # states of bitmaps
    Problem(
        "bitmap-inconsistent", _BITMAP, _LOSSLESS, _SILENT, "a bitmap whose last writer did not close the image",
        "writes since its last clean close may be missing in it: no incremental backup from it is safe",
        (
            "`qcow2bm why IMAGE BITMAP` lists the ways out: `qcow2bm repair IMAGE --in-use POLICY` makes it usable "
            "again without a full backup, `qcow2bm remove` gives it up"
        ),
    ),
    Problem(
        "bitmap-active", _HINT, _NONE, _SILENT, "a bitmap in use by a running VM",
        "its bits are in the memory of the VM",
        "ask again when the VM is off",
    ),
    Problem(
        "bitmap-detached", _BITMAP, _LOSSLESS, _SILENT, "a bitmap that a foreign writer has made void",
        "a program that knows no bitmaps wrote to the image; QEMU drops the bitmap at the next start",
        (
            "start no VM before you have decided; `qcow2bm why IMAGE BITMAP` lists the ways out: `qcow2bm repair IMAGE "
            "--detached POLICY` brings it back, otherwise start a new one with a full backup"
        ),
    ),
    # what bitmaps tell about each other
    Problem(
        "bitmaps-not-nested", _HINT, _NONE, _SILENT, "recording bitmaps of which none holds the other",
        "of two bitmaps that both recorded throughout, the older holds every bit of the newer",
        (
            "expected after a merge into or a change of one of them; otherwise compare with a backup before "
            "relying on it"
        ),
    ),
    Problem(
        "bitmap-misses-overlay", _HINT, _NONE, _SILENT,
        "clusters of an overlay that a recording bitmap does not hold",
        "all that an overlay holds was written since it was made: an older recording bitmap must hold it",
        "expected if the bitmap was added or cleared after the overlay was made; otherwise it misses writes",
    ),
)  # fmt: skip

PROBLEMS: dict[str, Problem] = {problem.code: problem for problem in _ROWS}
"""All problems by code, in the order of the documentation."""
SHARED = ("clusters-shared", "metadata-overlap", "bitmap-clusters-shared")
"""Those of clusters with more uses than one."""
HELD_BACK = ("leak-unproven", "leak-doubtful", "leak-lost-table")
"""Those of clusters without a reference that may be no leaks."""
NOT_ITS_OWN = ("bitmap-clusters-shared", "bitmap-clusters-uncounted")
"""Those of a bitmap's clusters that may hold something else than its bits."""


_NO_VALUES: Mapping[str, int] = {}
"""Shared: there may be hundreds of thousands of findings."""


def found(
    code: str, message: str, location: Location, *, count: int = 1, qemu: InQemu | None = None, **values: int
) -> Finding:
    """A finding of the problem with this code.

    Args:
        qemu: what `qemu-img check` makes of it here, where that is not what the table says.
        values: the numbers behind the message.
    """
    problem = PROBLEMS[code]
    return Finding(problem, message, location, problem.qemu if qemu is None else qemu, count, values or _NO_VALUES)


def from_fault(
    fault: Fault, location: Location, *, qemu: InQemu | None = None, prefix: str = "", **values: int
) -> Finding:
    """A rule of the format that does not hold, as a finding."""
    return found(fault.code, prefix + fault.message, location, qemu=qemu, **values)
