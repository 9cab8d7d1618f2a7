import subprocess
import sys
from pathlib import Path

import pytest

from normfree.files import MANIFEST_NAME, damages, folder_lock, read_manifest, write_atomically, write_manifest


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    (tmp_path / "sub" / "b.txt").write_text("hello")
    write_manifest(tmp_path, {"step": 3})
    return tmp_path


def test_a_sealed_folder_keeps_its_facts(sealed: Path) -> None:
    assert damages(sealed) == []
    assert read_manifest(sealed)["step"] == 3
    assert set(read_manifest(sealed)["files"]) == {"a.bin", "sub/b.txt"}


def test_a_missing_or_broken_manifest_is_damage(sealed: Path) -> None:
    (sealed / MANIFEST_NAME).write_text('{"files": ')
    assert "damaged" in damages(sealed)[0]
    write_manifest(sealed, {"step": 3})
    text = (sealed / MANIFEST_NAME).read_text()
    (sealed / MANIFEST_NAME).write_text(text.replace('"step": 3', '"step": 4'))
    assert "seal" in damages(sealed)[0]
    (sealed / MANIFEST_NAME).unlink()
    assert "never finished" in damages(sealed)[0]


def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, 3)  # pyright: ignore[reportArgumentType]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_names_its_process_and_dies_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from normfree.files import folder_lock\n"
        f"with folder_lock(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {holder.pid} on"), folder_lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with folder_lock(tmp_path):
        pass
