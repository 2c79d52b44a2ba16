"""Where guest data lies and how: what keeps QEMU from opening an image, and the name of a data file."""

from __future__ import annotations

from collections.abc import Iterator

from ...format.extensions import ExtensionType
from ...format.limits import MAX_ENCRYPTION_HEADER
from ...format.opening import opening_faults
from ..model import Finding, InQemu, Location
from ..problems import found, from_fault
from ..view import View


def refusals(view: View) -> Iterator[Finding]:
    """What QEMU refuses to open the image for; the clusters of an encryption header are the mapping's business."""
    indices = {extension.offset: index for index, extension in enumerate(view.image.extensions.extensions)}
    for fault, at, value in opening_faults(view.header, view.image.extensions, view.file.read_padded):
        where = Location("extensions" if at in indices else "header", at, indices.get(at))
        minds = fault.code != "encryption-header-size" or value <= MAX_ENCRYPTION_HEADER
        yield from_fault(fault, where, qemu=None if minds else InQemu.SILENT, value=value)


def data_file(view: View) -> Iterator[Finding]:
    """The name of the data file."""
    name = view.image.extensions.find(ExtensionType.DATA_FILE)
    if view.header.has_data_file:
        if name is None or not name.data:
            text = "guest data lies in a data file, but the image does not name it"
            yield found("data-file-name-missing", text, Location("extensions"))
    elif name is not None:
        text = "a data file is named, but the image keeps its data itself"
        yield found("data-file-name-unused", text, Location("extensions", name.offset))
