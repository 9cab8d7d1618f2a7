"""Code of an interpreter in which normfree is not installed, as with those who only load a saved model."""

WITHOUT_NORMFREE = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "normfree":
            raise ModuleNotFoundError("normfree is not installed here")

sys.meta_path.insert(0, Blocker())
try:
    import normfree
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("normfree was importable: this test proves nothing")
"""
