# Sourced by the install scripts, with $python set and the repository as the folder: what both environments need.

# uv reads none of pip's settings, and a CPU build of torch may lie in folders that they name.
if [ -z "${UV_FIND_LINKS:-}" ] && [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="${PIP_FIND_LINKS// /,}"; fi

# packages COMMAND ARGUMENTS: uv's pip where uv is on PATH, else the environment's own.
packages() {
    if command -v uv >/dev/null; then UV_PYTHON=$python uv pip "$@"; else "$python" -m pip "$@"; fi
}

# Let torchvision be imported beside a CPU build of torch.
mend_torchvision() {
    local site
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    cp .ci/lmms_eval/torchvision_on_cpu.py "$site/"
    echo 'import torchvision_on_cpu' > "$site/torchvision_on_cpu.pth"
}
