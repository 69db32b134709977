"""deploy/: the systemd unit by systemd-analyze, the Kubernetes manifest by its schemas, and the options that
they pass by podium itself. deploy.py PODIUM DEPLOY FOLDER"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import yaml


def known_options(binary: Path) -> str:
    return subprocess.run([binary, "serve", "--help"], capture_output=True, text=True, check=True).stdout


def check_options(arguments: list, known: str) -> None:
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in known, f"podium serve has no {argument}"


def check_unit(binary: Path, deploy: Path, folder: Path, known: str) -> None:
    # As installed, but for the place of the binary, which the check wants to be there.
    text = (deploy / "podium.service").read_text().replace("/usr/local/bin/podium", str(binary))
    unit = folder / "podium.service"
    unit.write_text(text)
    [start] = [line for line in text.splitlines() if line.startswith("ExecStart=")]
    check_options(shlex.split(start.removeprefix("ExecStart=")), known)
    if shutil.which("systemd-analyze") is None:
        print("podium.service: systemd-analyze is not there, only the options were checked")
        return
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "podium" in line]
    assert done.returncode == 0 and not complaints, done.stderr
    rating = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit], capture_output=True, text=True
    )
    level = [line for line in rating.stdout.splitlines() if "Overall exposure" in line]
    print(f"podium.service: systemd-analyze finds nothing; {level[0].strip(' →') if level else 'exposure not rated'}")


def check_manifest(deploy: Path, known: str) -> None:
    documents = list(yaml.safe_load_all((deploy / "kubernetes.yaml").read_text()))
    for document in documents:
        version = kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    [deployment] = [document for document in documents if document["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    check_options(container["args"], known)
    drain = int(container["args"][container["args"].index("--drain-timeout") + 1])
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > drain + pause
    print(f"kubernetes.yaml: {len(documents)} documents valid by the schemas of Kubernetes {version}; it waits for the drain")


def main() -> None:
    binary, deploy, folder = map(Path, sys.argv[1:])
    known = known_options(binary)
    check_unit(binary, deploy, folder, known)
    check_manifest(deploy, known)


if __name__ == "__main__":
    main()
