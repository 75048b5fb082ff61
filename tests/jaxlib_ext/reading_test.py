"""What damaged files do to who reads them: one line, and no hang."""

import os

import pytest

from jaxlib_ext import reading, records

SHAPE = {"a": int, "b?": [float], "c?": {str: str}}
REFUSED = {
  "": "the file is empty",
  "[]": "allowed: an object",
  "7": "allowed: an object",
  "{}": "no field 'a'",
  '{"a": "1"}': "a: got '1'; allowed: a whole number",
  '{"a": true}': "a: got True",
  '{"a": 1.5}': "a: got 1.5",
  '{"a": NaN}': "NaN is no JSON number",
  '{"a": 1, "b": [1, "x"]}': r"b: \[1\]: got 'x'; allowed: a number",
  '{"a": 1, "c": {"x": 3}}': "c: x: got 3; allowed: text",
  '{"a": 1': "not JSON",
  '{"a": ' + "9" * 5000 + "}": "not JSON",
  "[" * 100_000: "nested more than 100",
  '{"a":' * 100_000: "nested more than 100",
  "\ud800": "not UTF-8 at byte 0",
}
ACCEPTED = (
  '{"a": 1, "b": [1, 2.5], "c": {"x": "y"}, "else": null}',
  '{"a": 1, "text": "' + '[{\\"' * 200 + '"}',
  '{"a": 1, "wide": [' + ",".join(["{}"] * 200) + "]}",
)


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_refused(tmp_path, text):
  path = tmp_path / "f.json"
  path.write_bytes(text.encode("utf-8", "surrogatepass"))
  with pytest.raises(reading.ReadError, match=REFUSED[text]) as e:
    reading.read_json(path, SHAPE)
  assert str(path) in str(e.value)
  assert "\n" not in str(e.value)
  assert len(str(e.value)) < len(str(path)) + 200


@pytest.mark.parametrize("text", ACCEPTED, ids=range(len(ACCEPTED)))
def test_accepted(tmp_path, text):
  path = tmp_path / "f.json"
  path.write_text(text)
  assert reading.read_json(path, SHAPE)["a"] == 1


def test_what_is_no_file(tmp_path):
  pipe = tmp_path / "pipe"
  os.mkfifo(pipe)
  with pytest.raises(reading.ReadError, match="got a pipe"):
    reading.read_text(pipe)
  with pytest.raises(reading.ReadError, match="got a directory"):
    reading.read_text(tmp_path)
  with pytest.raises(reading.ReadError, match="got a device"):
    reading.read_text("/dev/zero")
  with pytest.raises(reading.ReadError, match="NUL"):
    reading.read_text("a\0b")
  with pytest.raises(FileNotFoundError):
    reading.read_text(tmp_path / "none")
  with open(tmp_path / "sparse", "wb") as f:
    f.truncate(1 << 40)
  with pytest.raises(reading.ReadError, match="allowed: at most"):
    reading.read_text(tmp_path / "sparse")


@pytest.mark.parametrize(
  "name", ["", ".", "..", "a/b", "/a", "../a", "a\\b", "a\0b", 3, None]
)
def test_names_that_lead_elsewhere(name):
  assert reading.plain_name("a-b.bin", "list") == "a-b.bin"
  with pytest.raises(reading.ReadError, match="^list: got"):
    reading.plain_name(name, "list")


def test_nothing_is_written_through_a_link_or_a_pipe(tmp_path):
  other = tmp_path / "other"
  other.write_text("theirs")
  for make in (lambda p: p.symlink_to(other), os.mkfifo):
    part, path = tmp_path / "a.json.part", tmp_path / "b.jsonl"
    make(part)
    make(path)
    with pytest.raises(OSError):
      records.write_json(tmp_path / "a.json", {})
    with pytest.raises(OSError):
      records.append(path, {})
    part.unlink()
    path.unlink()
  assert other.read_text() == "theirs"


def test_records(tmp_path):
  path = tmp_path / "r.jsonl"
  assert records.read(path) == []
  path.write_text('{"step": 1}\n{"st')
  assert records.read(path, {"step": int}) == [{"step": 1}]
  for line in ("7", '{"step": "1"}', "[" * 10_000, "{"):
    path.write_text(f'{line}\n{{"step": 1}}\n')
    with pytest.raises(reading.ReadError, match="line 1: "):
      records.read(path, {"step": int})
