try:
    from minilora.course.exercises import absent, chosen, given, predicted, verdict
except ImportError:
    raise SystemExit("minilora is not installed where this kernel runs; its README says how") from None
