import subprocess
import sys
from pathlib import Path

import pytest

from normfree.files import MANIFEST_NAME, damages, folder_lock, read_manifest, write_atomically, write_manifest


def test_a_manifest_keeps_facts_and_shows_damage_to_itself(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    (tmp_path / "sub" / "b.txt").write_text("hello")
    manifest = tmp_path / MANIFEST_NAME
    for content, message in (('{"files": ', "damaged"), (None, "seal")):
        write_manifest(tmp_path, {"step": 3})
        assert damages(tmp_path) == []
        assert read_manifest(tmp_path)["step"] == 3
        assert set(read_manifest(tmp_path)["files"]) == {"a.bin", "sub/b.txt"}
        manifest.write_text(content or manifest.read_text().replace('"step": 3', '"step": 4'))
        assert message in damages(tmp_path)[0]
    manifest.unlink()
    assert "never finished" in damages(tmp_path)[0]


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
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {holder.pid} on"), folder_lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with folder_lock(tmp_path):
        pass
