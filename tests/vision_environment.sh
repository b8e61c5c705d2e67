#!/usr/bin/env bash
# Tests of sources that need torchvision: in an environment of their own, with torch and torchvision of one build.
#   tests/vision_environment.sh [FOLDER]      default: .ci/vision. Downloads a few GB the first time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-.ci/vision}"
if [[ ! -x "$folder/bin/pytest" ]]; then
  "${PYTHON:-python3}" -m venv "$folder"
  "$folder/bin/pip" install -c constraints.txt -e '.[timm,torchvision,hf,onnx-import,test]' onnxscript
fi
"$folder/bin/python" -m pytest -m slow tests/test_sources_vision.py -p no:cacheprovider
