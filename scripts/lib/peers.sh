# shellcheck shell=bash
# Builds the peers that Podium is measured beside: sourced by the scripts that do.

peers=${PODIUM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/podium}/peers
python=$peers/venv/bin/python
# The newest sources of llama.cpp that a package index carries.
bindings=llama_cpp_python-0.3.36
sources=$peers/$bindings/vendor/llama.cpp

# A Python with these packages: install_packages PACKAGE...
install_packages() {
    local missing=()
    for package in "$@"; do
        "$python" -c "import $package" 2>/dev/null || missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    say "Installing ${missing[*]} into $peers/venv"
    mkdir -p "$peers"
    [[ -x $python ]] || python3 -m venv "$peers/venv"
    "$python" -m pip install --quiet "${missing[@]}" >&2
}

# Builds programs of llama.cpp into $llama, for this processor (native), or for AVX2, FMA and F16C and nothing
# newer (avx2), or for those and AVX-VNNI (avx-vnni): build_llama_cpp ISA MODEL PROGRAM...
build_llama_cpp() {
    local isa=$1 model=$2 missing=() targets=() folder=$sources/build flags=(-DGGML_NATIVE=ON) status=0
    shift 2
    case $isa in
    native) ;;
    avx2 | avx-vnni)
        folder=$sources/build-$isa
        flags=(-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON)
        [[ $isa != avx-vnni ]] || flags+=(-DGGML_AVX_VNNI=ON)
        ;;
    *)
        echo "error: --isa is native, avx2 or avx-vnni, not '$isa'." >&2
        exit 2
        ;;
    esac
    llama=$folder/bin
    for program in "$@"; do
        targets+=(--target "$program")
        [[ -x $llama/$program ]] || missing+=("$program")
    done
    build() { # FLAG...
        (
            cd "$peers"
            [[ -f $bindings.tar.gz ]] ||
                "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python "${bindings//_cpp_python-/-cpp-python==}"
            [[ -d $sources ]] || tar xzf "$bindings.tar.gz"
            cd "$sources"
            PATH=$peers/venv/bin:$PATH
            cmake -B "$folder" -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF \
                -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF "$@"
            cmake --build "$folder" -j "$(nproc)" "${targets[@]}"
        ) >&2
    }
    if ((${#missing[@]})); then
        say "Building ${missing[*]} from $bindings (ten minutes on two cores)"
        build "${flags[@]}"
    fi
    # A virtual machine may announce Intel's matrix tiles and not run them, or llama.cpp may fall over them: then
    # it does without.
    [[ $isa == native && -x $llama/llama-bench ]] || return 0
    "$llama/llama-bench" -m "$model" -p 32 -n 1 -r 1 >/dev/null 2>&1 || status=$?
    if ((status > 128)); then
        say "llama.cpp does not run with AMX on this machine: building it without"
        flags=(-DGGML_NATIVE=OFF)
        for pair in avx:AVX avx2:AVX2 fma:FMA f16c:F16C bmi2:BMI2 avx_vnni:AVX_VNNI avx512bw:AVX512 \
            avx512vbmi:AVX512_VBMI avx512_vnni:AVX512_VNNI avx512_bf16:AVX512_BF16; do
            ! grep -qw "${pair%:*}" /proc/cpuinfo || flags+=("-DGGML_${pair#*:}=ON")
        done
        build "${flags[@]}"
    fi
}
