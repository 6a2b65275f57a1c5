#!/bin/bash
# Fuzzes the native module under the address and undefined-behaviour sanitizers: builds it and a copy
# of the package into a temporary directory, never into src, and runs tests/soak/sanitized.py on that.
#
#   tests/soak/asan.sh [SECONDS]     how long the fuzzing lasts; 120 unless told
#
# Ends with 0 when no test failed and no sanitizer reported anything. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=${1:-120}
python=${PYTHON:-.venv/bin/python}
cc=${CC:-gcc}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/site" "$work/tmp"
cp -r src/fanwise "$work/site/"
rm -f "$work"/site/fanwise/kernel/_native*.so
"$cc" -shared -fPIC -g -O1 -fno-omit-frame-pointer -std=c11 -Wall -Wextra -fvisibility=hidden \
  -fsanitize=address,undefined -fno-sanitize-recover=all -DPy_LIMITED_API=0x030B0000 \
  -I"$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
  src/fanwise/kernel/*.c -o "$work/site/fanwise/kernel/_native.abi3.so" -pthread

# Python's own allocator would hide what is read beyond a bytes object; its leaks are not ours.
export LD_PRELOAD="$("$cc" -print-file-name=libasan.so) $("$cc" -print-file-name=libubsan.so)"
export PYTHONMALLOC=malloc PYTHONPATH="$work/site" PYTHONDONTWRITEBYTECODE=1 TMPDIR="$work/tmp"
export ASAN_OPTIONS="detect_leaks=0:halt_on_error=1:exitcode=99:allocator_may_return_null=1"
export UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1:exitcode=98"

# A report ends the process that it is about, and that ends the run: with 98, 99 or a failed test.
"$python" tests/soak/sanitized.py "$seconds" || {
  echo "asan.sh: failed" >&2
  exit 1
}
