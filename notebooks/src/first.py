import importlib.util

missing = [name for name in (*NEEDS, *USES) if importlib.util.find_spec(name) is None]
for name in missing:
    package = {"minilora": "minilora, as its README says", "sklearn": "scikit-learn"}.get(name, name)
    then = "nothing below runs without it" if name in NEEDS else "what needs it below is left out"
    print(f"not installed: {name}; install {package}, and restart the kernel; {then}")
if {*missing} & {*NEEDS}:
    raise SystemExit("stopped")

from minilora.course.exercises import chosen, given, predicted, verdict
