#!/bin/sh
# A working week of an office VM: look at its bitmaps, join five days into one, look again.
# Needs the installed `qcow2bm` and nothing of QEMU. Run it by `make demo`.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
bin=$root/.venv/bin
image=$root/fixtures/office-week/image.qcow2.gz
work=$root/.demo

rm -rf "$work"
mkdir "$work"
cd "$work"
# Python's gzip, because a minimal system may lack the gunzip program.
"$bin/python" -c 'import gzip, shutil, sys
with gzip.open(sys.argv[1]) as packed, open("vm.qcow2", "wb") as image:
    shutil.copyfileobj(packed, image)' "$image"

run() {
    printf '\n$ qcow2bm %s\n' "$*"
    "$bin/qcow2bm" "$@"
}

run list vm.qcow2
run merge vm.qcow2 weekly mon tue wed thu fri --create
run show vm.qcow2 weekly
run list vm.qcow2

printf '\nThe image stays in .demo/vm.qcow2 for you to play with.\n'
