#!/bin/sh
# Compares the contract with the last commit: nothing that a client compiled against may change its meaning.
# With an unchanged working tree, compares the last change of the contract with what was there before it.
set -eu
cd "$(dirname "$0")/.."
if git diff --quiet HEAD -- protos; then
  base=$(git log -1 --format=%H -- protos)~1
else
  base=HEAD
fi
if ! git cat-file -e "$base:protos/buf.yaml" 2>/dev/null; then
  echo "buf breaking: the contract is new, there is nothing to compare it with"
  exit 0
fi
exec "${1:-buf}" breaking protos --against ".git#ref=$(git rev-parse "$base"),subdir=protos"
