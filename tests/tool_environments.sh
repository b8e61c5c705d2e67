#!/usr/bin/env bash
# Environments of the tools that policies are exported to, and the proofs in them.
#   tests/tool_environments.sh [TOOL ...]     default: all of tests/tools/requirements. Downloads a few GB the first time.
# Each tool has a virtual environment of its own in .ci/tools (elsewhere: AUTOPRUNE_TOOLS), for no two of them agree on
# their dependencies. The proofs are run by the Python that runs pytest here, which needs autoprune's own test packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${AUTOPRUNE_TOOLS:-.ci/tools}"
if [[ $# -eq 0 ]]; then
  mapfile -t tools < <(basename -s .txt tests/tools/requirements/*.txt)
else
  tools=("$@")
fi
for tool in "${tools[@]}"; do
  if [[ ! -f "tests/tools/requirements/$tool.txt" ]]; then
    echo "tests/tool_environments.sh: no tool $tool; there is: $(basename -s .txt tests/tools/requirements/*.txt | xargs)" >&2
    exit 1
  fi
  if [[ ! -f "$folder/$tool/complete" ]]; then
    "${PYTHON:-python3}" -m venv --clear "$folder/$tool"
    "$folder/$tool/bin/pip" install -r "tests/tools/requirements/$tool.txt"
    touch "$folder/$tool/complete"
  fi
done
python -m pytest -m slow tests/test_tools.py -p no:cacheprovider
