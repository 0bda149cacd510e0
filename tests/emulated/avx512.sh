#!/usr/bin/env bash
# Runs a test binary at AVX-512 or AMX on a CPU that lacks it: in Linux, in Bochs, which emulates the whole machine. Fails if the tests do.
#
#   tests/emulated/avx512.sh <bochs> <bochs' bios folder> <kernel> <test binary> [arguments of the test binary]
#
# CPU in the environment is the model and its features as Bochs takes them; MRA_ATTENTION_REQUIRE_ISA the levels that must be there.
# CONTRIBUTING.md says where to get the rest. Wants xorriso, isolinux, syslinux-common, busybox-static and cpio (names of Debian).
set -euo pipefail

[ $# -ge 4 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
bochs=$1 bios=$(realpath "$2") kernel=$3 tests=$4
shift 4
limit=${LIMIT:-3600} # seconds

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/root/{bin,dev,proc,sys} "$work/cd"

# The first process of the guest. The environment is what the tests look at: without AVX-512 they must not pass.
cp "$(command -v busybox)" "$work/root/bin/busybox"
cat >"$work/root/init" <<EOF
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox grep -o -m 1 'avx512.*' /proc/cpuinfo
export RUST_TEST_THREADS=1 RUST_BACKTRACE=1 MRA_ATTENTION_REQUIRE_ISA=${MRA_ATTENTION_REQUIRE_ISA:-avx2,avx512}
${PROPTEST_CASES:+export PROPTEST_CASES=$PROPTEST_CASES}
/tests $(printf '%q ' "$@")
echo "exit status \$?"
/bin/busybox sleep 1 # until the serial line has sent all of it
/bin/busybox poweroff -f
EOF
chmod +x "$work/root/init"
strip -o "$work/root/tests" "$tests"
ldd "$tests" | grep -o '/[^ ]*' | xargs cp -L --parents -t "$work/root"
(cd "$work/root" && find . | cpio --quiet -o -H newc | gzip -1) >"$work/cd/initrd"

# The mitigations of the kernel only cost time here.
cp "$kernel" "$work/cd/linux"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$work/cd"
cat >"$work/cd/isolinux.cfg" <<EOF
default linux
prompt 0
label linux
  kernel linux
  initrd initrd
  append console=ttyS0 quiet nokaslr mitigations=off nopcid noinvpcid random.trust_cpu=on panic=-1
EOF
xorriso -as mkisofs -quiet -o "$work/cd.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table "$work/cd"

# Time in the guest is the number of instructions, not that of this machine. On newer models, sapphire_rapids or
# arrow_lake, Linux 6.1 does not boot, with or without what they have more.
cat >"$work/bochsrc" <<EOF
cpu: ${CPU:-model=corei7_skylake_x}, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest=1024, host=1024
romimage: file=$bios/BIOS-bochs-latest, options=fastboot
vgaromimage: file=$bios/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin
ata0-master: type=cdrom, path=$work/cd.iso, status=inserted
boot: cdrom
display_library: nogui
com1: enabled=1, mode=file, dev=$work/serial
log: $work/log
panic: action=fatal
EOF
touch "$work/serial"
tail -f "$work/serial" &
follower=$!
timeout "$limit" "$bochs" -q -f "$work/bochsrc" >"$work/console" 2>&1 </dev/null || true
sleep 2
kill "$follower"
if ! grep -q '^exit status 0' "$work/serial"; then
    echo "The tests failed, or did not end; the last words of Bochs:" >&2
    tail -n 20 "$work/log" >&2
    exit 1
fi
