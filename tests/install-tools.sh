#!/bin/sh
# The QEMU programs that the tests compare with, and strace: installs what is missing where it may (as root, or by sudo
# without a password), else says what to install and fails. A skipped comparison would look like a passed one.
set -eu

tools="qemu-img qemu-io qemu-nbd qemu-storage-daemon nbdinfo strace"
# qemu-system-common brings qemu-storage-daemon, libnbd-bin brings nbdinfo.
packages="qemu-utils qemu-system-common libnbd-bin strace"

missing() {
    for tool in $tools; do command -v "$tool" >/dev/null || printf ' %s' "$tool"; done
}

[ -n "$(missing)" ] || exit 0
install="apt-get install -q -y --no-install-recommends $packages"
if command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
    echo "Installing$(missing): $install"
    apt-get update -q && DEBIAN_FRONTEND=noninteractive $install
elif command -v apt-get >/dev/null && sudo -n true 2>/dev/null; then
    echo "Installing$(missing): sudo $install"
    sudo -n apt-get update -q && sudo -n env DEBIAN_FRONTEND=noninteractive $install
fi
[ -z "$(missing)" ] || {
    echo "Missing:$(missing). On Debian and Ubuntu, install them by:" >&2
    echo "    sudo $install" >&2
    exit 1
}
