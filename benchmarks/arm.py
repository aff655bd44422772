"""Say which of fastcal's extras pip can install on 64-bit ARM, for each version of Python, without an ARM machine.

pip resolves the extra with all that it needs against the package index, and installs nothing: about 20 s for each.

    python benchmarks/arm.py [EXTRA...]
"""

import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: JetPack 6 is Ubuntu 22.04, with glibc 2.35 and Python 3.10; JetPack 7 is Ubuntu 24.04, with Python 3.12.
PYTHONS = ("3.10", "3.12")
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(35, 16, -1)] + ["manylinux2014_aarch64"]

#: TensorRT comes with JetPack, and the others are for development.
EXTRAS = ("cpu", "cuda12", "cuda13", "ray", "report")


def requirements(extra, python):
    """Yield the requirements of an extra that hold on ARM."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    environment = {"platform_machine": "aarch64", "python_version": python}
    for text in project["dependencies"] + project["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            requirement.marker = None
            yield str(requirement)


def main():
    for extra in sys.argv[1:] or EXTRAS:
        for python in PYTHONS:
            command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--target", "none"]
            command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
            command += [f"--platform={platform}" for platform in PLATFORMS]
            done = subprocess.run([*command, *requirements(extra, python)], capture_output=True, text=True)
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: No matching")]
            print(f"{extra:<8}Python {python}  {'can be installed' if done.returncode == 0 else errors or done.stderr}")


if __name__ == "__main__":
    main()
