import importlib.util


def verdict(check):
    """Say whether an answer to an exercise is right, and if not, why. A wrong one stops nothing."""
    try:
        print("right:", check())
    except AssertionError as e:
        print("not yet:", e)
    except Exception as e:  # of the answer itself
        print(f"not yet: your function ends in {type(e).__name__}: {e}")


missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
if missing:
    how = 'in the folder of minilora, run  pip install -e ".[notebooks]"  and restart the kernel'
    print(f"not installed: {', '.join(missing)}; {how}")
    if "minilora" in missing:
        raise SystemExit("nothing below can run without minilora")
    print("what needs it below is left out, and says so")
