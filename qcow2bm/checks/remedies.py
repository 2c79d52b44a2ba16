"""What `qcow2bm repair` does about each problem, and what that can cost: the words beside the classes of repair.

The class of a problem is in its row of `problems.py`. `docs/problems.md` and `qcow2bm explain` show both.
"""

from __future__ import annotations

from typing import NamedTuple

from .model import InQemu, Problem, RepairClass


class Remedy(NamedTuple):
    """What a repair does.

    Attributes:
        does: in a sentence; begins with "nothing: " and the reason where it does nothing.
        risk: what that can cost; empty if nothing.
    """

    does: str
    risk: str = ""


_BY_HAND = "nothing: nothing else in the image says what the field was"
_NO_UNDO = "without an undo file (--no-undo) what is taken out is gone for good, and the class is lossy"
_CONTENT = "the guest reads zeroes or the backing file where it read an error or foreign bytes before"

_ROWS: tuple[tuple[Remedy, str], ...] = (
    # header
    (
        Remedy(_BY_HAND),
        """
        header-cluster-bits header-length header-length-odd header-refcount-order compression-type-unknown
        extended-l2-cluster-size backing-name-offset backing-name-length backing-name-overlap l1-size l1-offset
        l1-too-small extension-too-long backing-format-length encryption-method encryption-extension-missing
        encryption-extension-unexpected encryption-extension-length encryption-header-offset encryption-header-size
        data-file-raw-without-file
        """,
    ),
    (Remedy("nothing: only a program that knows the features can say what they mean"), "unknown-incompatible"),
    (Remedy("nothing: which of the two counts depends on the program that wrote them"), "extension-duplicate"),
    (
        Remedy("nothing: the encryption header is in no other place of the image"),
        "encryption-header-outside encryption-header-magic encryption-header-damaged",
    ),
    (Remedy("nothing: the name of the data file is in no other place of the image"), "data-file-name-missing"),
    (Remedy("nothing: it may be the last trace of a data file that was lost"), "data-file-name-unused"),
    (Remedy("nothing: the guest's data would have to be moved in the data file"), "data-file-raw-offset"),
    (Remedy("the bytes are set to zero"), "header-padding extension-padding"),
    (
        Remedy(
            "the bits are cleared, as by any writer that does not know them: so they are with every other repair too",
            "what they vouch for is void",
        ),
        "unknown-autoclear",
    ),
    (
        Remedy("the feature bit is set to what the type says", "if the type is the damage, nothing can be unpacked"),
        "compression-type-bit",
    ),
    (Remedy("the mark is cleared once the refcounts are right"), "marked-dirty"),
    (Remedy("the mark is cleared at the very end, and only if no corruption is left"), "marked-corrupt"),
    (
        Remedy(
            "the image is taken for what the crash left of it, and then mended like any other; before that nothing is",
            "the journal, if it is found later, no longer leads back",
        ),
        "change-cut-short",
    ),
    # refcounts
    (
        Remedy(
            "a new refcount table is started in free clusters, all references are counted into it, and the header is "
            "switched to it"
        ),
        "refcount-table-missing refcount-table-size refcount-table-offset refcount-table-outside",
    ),
    (
        Remedy("the damaged refcount block is dropped, and what it counted is counted anew from the references"),
        """
        refcount-block-reserved refcount-block-unaligned refcount-block-outside refcount-block-shared
        refcount-unreadable
        """,
    ),
    (Remedy("the refcount is raised to the number of references"), "refcount-too-low"),
    (Remedy("nothing: refcounts of this width have no room for the number"), "refcount-overflow"),
    (Remedy("the flag is set to what the refcount says"), "copied-l1 copied-l2"),
    # leaks
    (Remedy("the refcount is lowered, and the clusters are free"), "leak"),
    (
        Remedy(
            "the clusters are freed once what may have cut them off is repaired; while that is there they stay",
            "they may hold what the damage has cut off from the image; the undo file brings that back only as long as "
            "nothing else was written there",
        ),
        "leak-unproven",
    ),
    (
        Remedy(
            "the clusters are freed",
            "they may hold what is missing from the image; the undo file brings that back only as long as nothing else "
            "was written there",
        ),
        "leak-doubtful",
    ),
    (
        Remedy(
            "the clusters are freed",
            "the guest's data in them; the undo file brings it back only as long as nothing else was written there",
        ),
        "leak-lost-table",
    ),
    (Remedy("the clusters are freed", "the bitmaps cannot be brought back after that"), "leak-lost-bitmap"),
    (
        Remedy(
            "nothing while their bitmaps are there; `--detached remove` gives the clusters back with them",
            "the bitmaps cannot be brought back after that",
        ),
        "leak-detached-bitmap",
    ),
    # snapshots
    (
        Remedy(
            "the snapshot table is written anew without the snapshots that cannot be used; the others stay",
            "the snapshots that are dropped; the disk itself is not concerned",
        ),
        "snapshot-l1-unaligned snapshot-l1-size snapshot-l1-too-small snapshot-l1-outside",
    ),
    (
        Remedy("all snapshots are dropped", "all snapshots; the disk itself is not concerned"),
        "snapshot-count snapshot-table-offset snapshot-table-outside data-file-snapshots",
    ),
    (
        Remedy(
            "extra data is cut to 1024 bytes, and the snapshots from the first one on that still cannot be read are "
            "dropped",
            "what a program wrote beyond that, and the snapshots that are dropped; the disk itself is not concerned",
        ),
        "snapshot-table-size snapshot-extra-data-size",
    ),
    (Remedy("the missing fields are written, with the disk's size of today as QEMU does"), "snapshot-incomplete"),
    (Remedy("the snapshot gets an id that no other one has"), "snapshot-id"),
    (Remedy("nothing: which of the overlapping tables is right nobody can tell"), "snapshot-l1-excessive"),
    # mapping
    (Remedy("nothing: the table is in no other place of the image"), "l1-outside"),
    (Remedy("nothing: the data counts again if the disk grows"), "mapping-past-end"),
    (
        Remedy("the reserved bits are cleared", "the offset beside them may be damaged as well: " + _CONTENT),
        "l1-entry-reserved l2-entry-reserved",
    ),
    (
        Remedy("the flag is cleared, and the entry counts as data", "where the flag meant zeroes the guest reads data"),
        "zero-flag-reserved",
    ),
    (Remedy("the flags are cleared: nothing is mapped there, as the guest finds it"), "l1-entry-no-table"),
    (
        Remedy("the L1 entry is given up", _CONTENT + ", in all that the table mapped"),
        "l2-unaligned l2-outside",
    ),
    (
        Remedy("the entry becomes a zero cluster, in version 2 an unallocated one", _CONTENT),
        "data-unaligned zero-unaligned data-outside compressed-outside compressed-data-file",
    ),
    (Remedy("the flag is cleared"), "compressed-copied"),
    (
        Remedy("the subcluster bitmap is cleared", "if the compressed flag is the damage, the data cannot be unpacked"),
        "compressed-subclusters",
    ),
    (
        Remedy("the zero bits are cleared and the data is kept", "the guest may read old data instead of zeroes"),
        "subclusters-contradict",
    ),
    (Remedy("the allocation bits are cleared", _CONTENT), "subclusters-unallocated"),
    (
        Remedy("one of the places gets a copy in a free cluster: both read what they read today, and no longer share"),
        "clusters-shared",
    ),
    (
        Remedy(
            "the guest's cluster, or the L2 table, is copied to a free cluster and both owners read what they read "
            "today; what cannot be moved (the header, an L1 table) stays as it is and is reported"
        ),
        "metadata-overlap",
    ),
    # extension and directory of bitmaps
    (Remedy("the autoclear bit is cleared: it vouches for nothing"), "bitmaps-extension-missing"),
    (Remedy("the field is set to zero, and every bitmap stays as it is"), "bitmaps-extension-reserved"),
    (
        Remedy(
            "the length is corrected if that leads to bitmaps that are sound; if not, the extension is dropped",
            _NO_UNDO,
        ),
        "bitmaps-extension-length",
    ),
    (
        Remedy(
            "bitmaps that can be read and are sound are kept in a new directory, bit for bit; all else is quarantined "
            "in the undo file; a directory that nothing refers to any more is used again if there is just one, and if "
            "nothing can be read the extension is dropped",
            _NO_UNDO,
        ),
        """
        bitmaps-count bitmap-directory-size bitmap-directory-offset
        bitmap-directory-outside bitmap-directory-entries
        """,
    ),
    # single bitmaps
    (
        Remedy(
            "this bitmap is quarantined: taken out of the directory, with entry, table and data kept in the undo file "
            "(`qcow2bm undo IMAGE UNDO-FILE --bitmap NAME` brings it back); the others stay, bit for bit",
            _NO_UNDO,
        ),
        """
        bitmap-table-offset bitmap-table-size bitmap-flags bitmap-type bitmap-extra-data
        bitmap-extra-data-compatible bitmap-granularity bitmap-table-outside bitmap-tables-excessive
        bitmap-entry-reserved bitmap-entry-all-ones bitmap-entry-unaligned bitmap-data-outside
        """,
    ),
    (
        Remedy(
            "the parts of the bitmap whose bits lie in such a cluster are marked as dirty; a bitmap whose table does "
            "is quarantined in the undo file; the other owner keeps the cluster",
            "more is marked than has changed; " + _NO_UNDO,
        ),
        "bitmap-clusters-shared",
    ),
    (
        Remedy(
            "bits that lie in such a cluster count as dirty; a bitmap with its table there "
            "is quarantined in the undo file",
            "more is marked than has changed; " + _NO_UNDO,
        ),
        "bitmap-clusters-uncounted",
    ),
    (
        Remedy(
            "a bitmap without a name gets one, of a name with a zero byte what follows that goes, a bitmap with a too "
            "long name is quarantined in the undo file",
            _NO_UNDO,
        ),
        "bitmap-name",
    ),
    (Remedy("the second one gets a name of its own; its bits stay"), "bitmap-name-duplicate"),
    (Remedy("the bytes are set to zero"), "bitmap-padding"),
    (Remedy("the bits past the end are set to zero"), "bitmap-tail-bits"),
    (Remedy("nothing: the bitmap is right, it only takes more room than it needs"), "bitmap-needless-clusters"),
    (
        Remedy(
            "nothing unless --in-use names a policy: all-dirty, allocated, rebuild and snapshot make it usable again, "
            "remove (with --allow lossy) gives it up",
            "`--in-use remove` is lossy: the next backup is a full one; all but all-dirty rest on what you say in "
            "their options",
        ),
        "bitmap-inconsistent",
    ),
    (
        Remedy(
            "nothing unless --detached names a policy: all-dirty, allocated, rebuild and snapshot bring it back, "
            "remove (with --allow lossy) gives it up",
            "`--detached remove` is lossy: the next backup is a full one; all but all-dirty rest on what you say in "
            "their options",
        ),
        "bitmap-detached",
    ),
    (Remedy("nothing: only the VM that has the bitmap open knows its bits"), "bitmap-active"),
    (
        Remedy("nothing: only a comparison with an older copy of the disk can tell whether anything is wrong"),
        "bitmaps-not-nested bitmap-misses-overlay",
    ),
)

REMEDIES: dict[str, Remedy] = {code: remedy for remedy, codes in _ROWS for code in codes.split()}
"""What `qcow2bm repair` does about each problem, by code."""

IN_QEMU = {
    InQemu.REFUSES: (
        "refuses to open the image: the VM does not start, and `qemu-img info`, `check` and `bitmap` fail as well"
    ),
    InQemu.FAILS: "`qemu-img check` gives up when it comes to it, and says nothing about the rest (exit status 1)",
    InQemu.ERROR: "`qemu-img check` counts an internal error, a `check-error` (exit status 1)",
    InQemu.CORRUPTION: "`qemu-img check` counts a corruption (exit status 2)",
    InQemu.LEAK: "`qemu-img check` counts a leak (exit status 3), and its `-r leaks` and `-r all` free the clusters",
    InQemu.SILENT: "`qemu-img check` says nothing, and takes the image for sound as far as this goes",
}
"""What QEMU does about a problem, in words."""

COSTS = {
    RepairClass.LOSSLESS: "all that the image says stays as it is; needs no --allow",
    RepairClass.LOSSY: "something the image refers to is given up; done only with --allow lossy",
    RepairClass.GUESS: "nobody can know what was meant; done only with --allow guess",
    RepairClass.NONE: "there is nothing that a repair of this image could do",
}
"""What a class of repair costs, in words."""


def repair_options(problem: Problem) -> tuple[str, ...] | None:
    """The options after `qcow2bm repair IMAGE` that allow what the problem needs; None if it does nothing."""
    return _OPTIONS[problem.repair]


_OPTIONS: dict[RepairClass, tuple[str, ...] | None] = {
    RepairClass.LOSSLESS: (),
    RepairClass.LOSSY: ("--allow", "lossy"),
    RepairClass.GUESS: ("--allow", "guess"),
    RepairClass.NONE: None,
}
