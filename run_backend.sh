#!/bin/sh
# The server alone, without a window: the same as `./qit serve`, and it takes the same options.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd -P)
exec "$root/qit" serve "$@"
