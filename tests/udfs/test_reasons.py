from shoal.udfs import reasons


def test_every_reason_is_either_permanent_or_transient() -> None:
    named = {value for name, value in vars(reasons).items() if name.isupper() and isinstance(value, str)}
    assert named == reasons.PERMANENT | reasons.TRANSIENT
    assert not reasons.PERMANENT & reasons.TRANSIENT
