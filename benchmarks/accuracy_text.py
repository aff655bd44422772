"""Pictures of text for the accuracy benchmark: lines and pages in many fonts, sizes and qualities, over photographs."""

import re

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

WORDS = re.findall(
    r"\w+",
    """
invoice total amount date number street city received signature account payment order customer item price quantity
discount delivery address telephone contract section article agreement licence software copyright permission notice
distribution warranty liability damages the of and to in for is on that with as by this be or from at which it are
not have was were will would There Their About After Before Between Under Museum Station Hotel Market Library Open
Closed Exit Entrance Platform Ticket Monday Tuesday Wednesday Thursday Friday January February March April Grand
Central Park Avenue Bridge River Mountain Ocean Temperature Pressure Voltage Battery Serial Warning Danger Caution
""",
)


def draw(kind, packages, photographs, seed):
    """Yield pictures of the kind "lines", "turned" (lines, every other one upside down) or "pages"."""
    random = np.random.default_rng([seed, len(kind)])
    faces = sorted((packages / "matplotlib/matplotlib/mpl-data/fonts/ttf").glob("*.ttf"))
    faces = [f for f in faces if f.stem.startswith(("DejaVuS", "STIXGeneral")) and "Display" not in f.stem]
    faces = faces[seed % 2 :: 2]  # calibration and held-out samples have no font in common
    for number, photograph in enumerate(photographs):
        picture = _page(random, faces, photograph) if kind == "pages" else _line(random, faces, photograph)
        picture = _spoil(random, picture)
        yield picture.rotate(180) if kind == "turned" and number % 2 else picture


def _words(random, length):
    """Return words and numbers of about `length` characters."""
    text = ""
    while len(text) < length:
        draw = random.random()
        if draw < 0.15:
            word = f"{random.integers(1, 10 ** int(random.integers(1, 7)))}"
        elif draw < 0.22:
            word = f"{random.integers(1, 32):02}/{random.integers(1, 13):02}/{random.integers(1990, 2030)}"
        elif draw < 0.3:
            word = f"${random.integers(1, 2000)}.{random.integers(100):02}"
        else:
            word = str(random.choice(WORDS))
            word = word.upper() if random.random() < 0.15 else word
            word += str(random.choice(["", "", "", "", ",", ".", ":", "-"]))
        text += (" " if text else "") + word
    return text


def _colours(random, behind):
    """Return a colour that stands out from the picture's part behind the text."""
    light = np.asarray(behind.convert("L")).mean()
    grey = random.uniform(0, max(0, light - 90)) if light > 127 else random.uniform(min(255, light + 90), 255)
    return tuple(int(np.clip(grey + random.uniform(-25, 25), 0, 255)) for _ in range(3))


def _paper(random, photograph, size):
    """Return a background of `size`: paper of one colour, or a part of a photograph."""
    if random.random() < 0.6:
        grey = random.uniform(150, 255) if random.random() < 0.8 else random.uniform(0, 90)
        return Image.new("RGB", size, tuple(int(np.clip(grey + random.uniform(-15, 15), 0, 255)) for _ in range(3)))
    picture = photograph.resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(random.uniform(0, 6)))
    return picture


def _line(random, faces, photograph):
    font = ImageFont.truetype(str(random.choice(faces)), int(random.integers(14, 60)))
    text = _words(random, int(random.integers(3, 20)))
    left, top, right, bottom = font.getbbox(text)
    margins = [int(font.size * random.uniform(0.05, 0.3)) for _ in range(4)]
    size = (right - left + margins[0] + margins[2], bottom - top + margins[1] + margins[3])
    picture = _paper(random, photograph, size)
    ImageDraw.Draw(picture).text((margins[0] - left, margins[1] - top), text, font=font, fill=_colours(random, picture))
    return picture.rotate(random.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=picture.getpixel((0, 0)))


def _page(random, faces, photograph):
    picture = _paper(random, photograph, (640, 640))
    canvas = ImageDraw.Draw(picture)
    y = int(random.integers(5, 60))
    while y < 620:
        font = ImageFont.truetype(str(random.choice(faces)), int(random.choice([12, 14, 16, 20, 24, 32, 48, 72])))
        x = int(random.integers(5, 250))
        for _ in range(int(random.integers(1, 5))):
            text = _words(random, int(random.integers(3, 1200 // font.size)))
            behind = picture.crop((x, min(y, 620), 640, min(y, 620) + 20))
            canvas.text((x, y), text, font=font, fill=_colours(random, behind))
            y += int(font.size * random.uniform(1.1, 1.8))
        y += int(random.integers(0, 120))
    return picture.rotate(random.uniform(-6, 6), Image.Resampling.BICUBIC, fillcolor=picture.getpixel((0, 0)))


def _spoil(random, picture):
    """Return the picture a little blurred, noisy or of lower resolution, as cameras and scanners give it."""
    draw = random.random()
    if draw < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(0.3, 1.2)))
    elif draw < 0.5:
        noise = random.normal(0, random.uniform(3, 15), (*picture.size[::-1], 3))
        picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    elif draw < 0.65:
        size = picture.size
        small = tuple(max(8, int(side * random.uniform(0.5, 0.8))) for side in size)
        picture = picture.resize(small, Image.Resampling.BILINEAR).resize(size, Image.Resampling.BILINEAR)
    return picture
