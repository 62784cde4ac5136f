"""Where compiled code is kept: it cannot be stale, and old ones go away."""

import os
import stat

import pytest

from ports import cache


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A tree of sources, and a cache, of our own."""
    root = tmp_path / "src"
    for package in ("ports", "vswitch/datapath"):
        (root / package).mkdir(parents=True)
    for name in ("ports/cache.py", "ports/base.py", "vswitch/datapath/fdb.py"):
        (root / name).write_text(f"# {name}\n")
    monkeypatch.setattr(cache, "__file__", str(root / "ports/cache.py"))
    monkeypatch.setenv("VSWITCH_CACHE_DIR", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("NUMBA_")]:
        monkeypatch.delenv(name)
    forget()
    yield root
    forget()


def forget():
    """As a new process would."""
    cache._base.cache_clear()
    cache.digest.cache_clear()


def directory():
    forget()
    return cache.cache_dir()


def test_the_same_sources_have_the_same_directory(sources, tmp_path):
    first = directory()
    os.utime(sources / "ports/base.py", (1, 1))
    (sources / "ports/notes.txt").write_text("not a source")
    assert directory() == first
    assert first.parent == tmp_path / "cache" / "jit"


@pytest.mark.parametrize("name", ["ports/base.py", "vswitch/datapath/fdb.py"])
def test_any_change_of_a_source_is_another_directory(sources, name):
    seen = {directory()}
    (sources / name).write_text("# changed\n")
    seen.add(directory())
    (sources / name).rename((sources / name).with_name("renamed.py"))
    seen.add(directory())
    (sources / name).with_name("new.py").write_text("")
    seen.add(directory())
    assert len(seen) == 4


def test_numbas_flags_and_the_cpu_are_a_part_of_it(sources, monkeypatch):
    seen = {directory()}
    for value in ("1", "2"):
        monkeypatch.setenv("NUMBA_BOUNDSCHECK", value)
        seen.add(directory())
    monkeypatch.setattr(cache, "_cpu_features", lambda: b"flags: fewer")
    seen.add(directory())
    assert len(seen) == 4
    monkeypatch.setenv("UNRELATED", "1")
    assert directory() in seen


def test_it_is_warm_once_a_worker_has_compiled_everything(sources):
    directory()
    assert not cache.is_warm()
    cache.cache_dir().mkdir()
    assert not cache.is_warm()
    cache.mark_warm()
    assert cache.is_warm()
    (sources / "ports/base.py").write_text("# changed\n")
    directory()
    assert not cache.is_warm()


def test_the_three_latest_others_are_kept(sources):
    base = directory().parent
    for age in range(5):
        old = base / f"old{age}"
        old.mkdir()
        (old / "code").write_text("")
        os.utime(old, (10**9 - age, 10**9 - age))
    (base / "a file").write_text("")
    cache.mark_warm()
    left = {path.name for path in base.iterdir()}
    assert left == {cache.cache_dir().name, "old0", "old1", "old2", "a file"}


def test_the_caches_place_is_the_users(sources, tmp_path, monkeypatch):
    monkeypatch.delenv("VSWITCH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert directory().parent == tmp_path / "xdg" / "vswitch" / "jit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert directory().parent == tmp_path / "home" / ".cache" / "vswitch" / "jit"


@pytest.fixture
def homeless(sources, tmp_path, monkeypatch):
    """No directory of the user's can be made; what stands in for /tmp."""
    monkeypatch.setenv("VSWITCH_CACHE_DIR", str(sources / "ports/base.py/no"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"vswitch-{os.getuid()}"


def test_without_a_home_the_cache_is_a_private_one_in_tmp(homeless):
    assert directory().parent == homeless / "jit"
    assert stat.S_IMODE(homeless.stat().st_mode) == 0o700
    assert directory().parent == homeless / "jit"


def test_a_directory_that_others_may_write_is_not_trusted_with_code(homeless):
    # Whoever writes there would run as us.
    homeless.mkdir()
    homeless.chmod(0o777)
    with pytest.raises(PermissionError, match="VSWITCH_CACHE_DIR"):
        directory()


def test_a_link_to_a_directory_is_not_trusted_with_code(homeless, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    homeless.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="VSWITCH_CACHE_DIR"):
        directory()
