"""Pictures: every sort of image becomes 8-bit RGB, bad files are named before training, and rows hold their digests."""

import copy
import hashlib
import io
import json
import re
import struct
import zlib

import datasets
import numpy
import pytest
from PIL import Image

from coppice import data, models
from coppice.core.errors import DataError
from coppice.data import picture_rows, pictures, prompts
from coppice.models.readers import Placeholder

TRAINING = {"format": "json", "splits": {"train": "train"}, "uses": ["training"]}


def encoded(image, form="PNG", **options):
    """Return the bytes of an image."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pixels(image, form="PNG", **options):
    """Return the decoded pixels [height, width, 3] of an image that was saved in a format."""
    decoded = pictures.decoded(encoded(image, form, **options))
    assert decoded.mode == "RGB"
    return numpy.asarray(decoded).astype(int)


def test_sixteen_bits_keep_their_shades_where_pillow_alone_would_cut_them_off():
    values = numpy.array([[0, 257, 0x8000, 0xFFFF]], dtype=numpy.uint16)
    for form in ("PNG", "TIFF"):
        assert pixels(Image.fromarray(values), form)[0, :, 0].tolist() == [value >> 8 for value in values[0].tolist()]


def test_what_is_transparent_lies_on_white_whatever_color_is_below_it():
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    image.putpixel((2, 0), (200, 0, 0, 51))
    blended = [round(0.2 * color + 0.8 * 255) for color in (200, 0, 0)]
    assert pixels(image)[0].tolist() == [[255, 255, 255], [200, 0, 0], blended]


def test_a_palette_with_a_transparent_color_and_gray_with_alpha_lie_on_white_too():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert pixels(palette)[0].tolist() == [[10, 20, 30], [200, 100, 50]]
    assert pixels(palette, transparency=0)[0].tolist() == [[255, 255, 255], [200, 100, 50]]
    gray = Image.new("LA", (1, 1), (90, 255))
    assert pixels(gray)[0].tolist() == [[90, 90, 90]]


def test_cmyk_is_read_as_the_inks_that_are_left_out_of_white():
    cyan, magenta, yellow, black = 0, 204, 153, 51
    image = Image.new("CMYK", (8, 8), (cyan, magenta, yellow, black))
    expected = [255 - min(255, ink + black) for ink in (cyan, magenta, yellow)]
    multiplied = [round((255 - ink) * (255 - black) / 255) for ink in (cyan, magenta, yellow)]
    found = pixels(image, "TIFF")[3, 3].tolist()
    assert any(max(abs(a - b) for a, b in zip(found, way, strict=True)) <= 1 for way in (expected, multiplied))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_and_the_size_is_that_of_the_rotated_picture(orientation):
    stored = numpy.arange(6, dtype=numpy.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {  # what the EXIF standard says of row 0 and column 0
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: numpy.rot90(stored, -1),
        7: stored[::-1, ::-1].T,
        8: numpy.rot90(stored, 1),
    }[orientation]
    content = encoded(Image.fromarray(stored), exif=exif)
    assert numpy.asarray(pictures.decoded(content))[..., 0].tolist() == upright.tolist()
    assert pictures.inspect(content) == (upright.shape[1], upright.shape[0], False)


def bomb():
    """Return a PNG of a few hundred bytes whose header says 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + encoded(Image.new("RGB", (9, 9)))[33:]


NOISE = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=numpy.uint8))
BAD = {
    "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing; convert it to PNG"),
    "text": (b"no picture", "is not an image that can be read"),
    "empty": (b"", "is not an image that can be read"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image that can be read"),
    "bomb": (bomb(), r"has more than \d+ million pixels|has 60000 x 60000 pixels"),
    "cut jpeg": (encoded(NOISE, "JPEG")[:-400], "is truncated or damaged"),
    "cut png": (encoded(NOISE)[:-400], "is truncated or damaged"),
    "cut webp": (encoded(NOISE, "WEBP")[:-400], "is truncated or damaged|is not an image|is damaged"),
    "fractions": (encoded(Image.new("F", (2, 2)), "TIFF"), "has fractions as pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_picture_that_cannot_be_used_says_why(name):
    content, reason = BAD[name]
    with pytest.raises(pictures.Unusable, match=reason):
        pictures.inspect(content)


def prepared(tmp_path, rows, **entry):
    """Prepare rows as the data set `mine` and return its record."""
    (tmp_path / "mine").mkdir(exist_ok=True)
    (tmp_path / "mine/train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data.prepare("mine", {"path": str(tmp_path / "mine"), **TRAINING, **entry}, tmp_path / "out", False)
    return tmp_path / "out/dataset.json"


def test_every_bad_picture_is_named_with_its_row_in_one_message(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(encoded(NOISE))
    (folder / "good.png").write_bytes(encoded(NOISE))
    (folder / "a.svg").write_bytes(BAD["svg"][0])
    (folder / "folder.png").mkdir()
    names = ["good.png", "gone.png", "a.svg", "../outside.png", "https://x.org/a.png", "folder.png", "", "good.png"]
    rows = [{"image": name, "question": "?", "answer": "a"} for name in [*names, *(f"no{n}.png" for n in range(5))]]
    with pytest.raises(DataError) as error:
        prepared(tmp_path, rows)
    message = str(error.value)
    for text in (
        "datasets.mine: 11 of its pictures cannot be used: train row 1: 'gone.png' is missing; train row 2: 'a.svg' is",
        "row 3: '../outside.png' lies outside",
        "row 4: 'https://x.org/a.png' is an address",
        "row 5: 'folder.png' is not a file",
        "row 6: 'a picture' names no file",
        "; and 3 more. Rows count from 0.",
        f"relative to {folder} (datasets.mine.image_root)",
    ):
        assert text in message
    assert "row 0:" not in message and "row 7:" not in message


def test_a_row_holds_the_digest_and_the_size_of_its_pictures_and_the_fingerprint_follows_them(tmp_path):
    root = tmp_path / "elsewhere"
    root.mkdir()
    (root / "a.png").write_bytes(encoded(NOISE))
    rows = [{"images": ["a.png", str(root / "a.png")], "question": "?", "answer": "a"}]
    record = prepared(tmp_path, rows, image_root=str(root))
    before = data.fingerprint(record, "train")
    (row,) = data.load(record, "train").to_list()
    digest = hashlib.sha256(encoded(NOISE)).hexdigest()
    assert row["images"] == [{"path": "a.png", "sha256": digest, "width": 60, "height": 40}] * 2
    (picture, _) = pictures.album(record, "train", models.Reader(None)).of_row(row)
    assert (numpy.asarray(picture.open()) == numpy.asarray(NOISE)).all()
    (root / "a.png").write_bytes(encoded(NOISE.rotate(90)))
    with pytest.raises(DataError, match=r"a\.png: the picture was changed after its data set was prepared"):
        picture.open()
    assert data.fingerprint(prepared(tmp_path, rows, image_root=str(root)), "train") != before


def test_bytes_in_the_rows_are_kept_as_files_beside_them(tmp_path):
    table = datasets.Dataset.from_list(
        [{"image": {"bytes": encoded(NOISE), "path": None}, "caption": "noise"}],
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )
    (tmp_path / "mine").mkdir()
    table.to_parquet(tmp_path / "mine/train.parquet")
    entry = {"path": str(tmp_path / "mine"), **TRAINING, "format": "parquet"}
    data.prepare("mine", entry, tmp_path / "out", False)
    (tmp_path / "out").rename(tmp_path / "moved")
    record = tmp_path / "moved/dataset.json"
    (picture,) = pictures.album(record, "train", models.Reader(None)).of_row(data.load(record, "train")[0])
    assert picture.root.is_relative_to(tmp_path / "moved") and picture.open().size == (60, 40)


def test_an_animated_picture_gives_its_first_frame_and_the_record_says_so(tmp_path):
    (tmp_path / "mine").mkdir()
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    (tmp_path / "mine/a.gif").write_bytes(content)
    record = prepared(tmp_path, [{"image": "a.gif", "caption": "red"}])
    assert "first frame" in data.facts(record, "train")["notes"][0]
    assert pictures.decoded(content).getpixel((0, 0)) == (255, 0, 0)


def test_a_column_called_image_that_holds_no_pictures_is_left_alone(tmp_path):
    record = prepared(tmp_path, [{"image": 391895, "prompt": "a", "completion": "b"}])
    assert data.load(record, "train")[0]["image"] == 391895


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_chats_about_pictures_are_prepared_for_training(tmp_path, column):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.png").write_bytes(encoded(NOISE))
    keys = ("role", "content", "user", "assistant") if column == "messages" else ("from", "value", "human", "gpt")
    turns = [{keys[0]: keys[2], keys[1]: "<image>What?"}, {keys[0]: keys[3], keys[1]: "A"}]
    record = prepared(tmp_path, [{"image": "a.png", column: turns}])
    assert data.load(record, "train")[0]["images"][0]["path"] == "a.png"


@pytest.mark.parametrize("answers", [[], ["a", " "], None])
def test_a_caption_that_is_empty_is_named_with_its_row(tmp_path, answers):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.png").write_bytes(encoded(NOISE))
    rows = [{"image": "a.png", "captions": ["fine"]}, {"image": "a.png", "captions": answers}]
    with pytest.raises(DataError, match=r"datasets\.mine: row 1 of its train rows .* empty captions\. Fill it in"):
        prepared(tmp_path, rows)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}[P]{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def formatter(kind, tokenizer, prompt="chat", template=TEMPLATE):
    """Return a formatter of rows for a model that writes pictures as [P]."""
    tokenizer = copy.copy(tokenizer)  # other tests share it
    tokenizer.chat_template = template
    return prompts.Formatter(kind, prompt, tokenizer, pictures.Album(None, Placeholder("[P]", "([P])")))


def facts(count):
    return [{"path": f"{n}.png", "sha256": "", "width": 8, "height": 8} for n in range(count)]


FORMS = {
    "messages": {"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A"}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
        ]
    },
    "unmarked": {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A"}]},
    "LLaVA": {"conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A"}]},
}


@pytest.fixture
def seeing(monkeypatch):
    """Let an album give as many pictures as a row lists, without files."""
    monkeypatch.setattr(pictures.Album, "of_row", lambda self, row: row["images"])


@pytest.mark.parametrize("form", FORMS)
def test_chats_with_pictures_are_read_in_every_form(form, tiny_tokenizer, seeing):
    (row,) = formatter("image-chat", tiny_tokenizer).rows(FORMS[form] | {"images": facts(1)}, "row 0")
    picture_first = "[P]What?" if form != "LLaVA" else "What?[P]"
    assert row.question == f"<user>{picture_first}|<assistant>" and row.references == ("A",)


@pytest.mark.parametrize("column", ["answer", "answers", "response"])
@pytest.mark.parametrize("asked", ["question", "prompt"])
def test_questions_about_pictures_are_read_in_every_form(column, asked, tiny_tokenizer, seeing):
    answer = ["A", "B"] if column == "answers" else "A"
    content = {"images": facts(2), asked: "Which?", column: answer}
    assert prompts.kind_of(content, "mine", ("image-answer",))
    rows = formatter("image-answer", tiny_tokenizer).rows(content, "row 0")
    assert [row.question for row in rows] == ["<user>[P][P]Which?|<assistant>"] * len(rows)
    assert [row.references for row in rows] == [("A",), ("B",)][: len(rows)]


def test_a_caption_asks_for_a_description_and_a_plain_prompt_writes_the_placeholder(tiny_tokenizer, seeing):
    form = formatter("image-caption", tiny_tokenizer, "none")
    (row,) = form.rows({"images": facts(1), "captions": ["a cat"]}, "row 0")
    assert row.question == f"([P]){picture_rows.CAPTION_PROMPT}\n" and row.segments[-1].text == "a cat"


def test_marks_and_pictures_of_a_row_must_be_equally_many(tiny_tokenizer, seeing):
    form = formatter("image-chat", tiny_tokenizer)
    with pytest.raises(DataError, match=r"row 7: its text marks 1 pictures with <image>, but the row has 2"):
        form.rows(FORMS["messages"] | {"images": facts(2)}, "row 7")


def test_a_template_that_leaves_pictures_out_is_an_error(tiny_tokenizer, seeing):
    form = formatter("image-chat", tiny_tokenizer, template=TEMPLATE.replace("[P]", ""))
    with pytest.raises(DataError, match=re.escape("row 7: has 1 pictures, but its text for the model 0 times [P]")):
        form.rows(FORMS["messages"] | {"images": facts(1)}, "row 7")
