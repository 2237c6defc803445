"""What steps take when an engine starts is measured on a real one."""

from jaxinfer.engine.costs import ALONE, FOLLOWED, PLAIN, Way
from jaxinfer.engine.timing import measure

WIDE, MODEL = Way(3), Way(3, hidden=True)


def test_every_way_is_measured_for_all_rows(speculating):
    costs = measure(speculating.program)
    assert costs.ways == [WIDE, MODEL]
    assert all(costs.ratio(way, rows) > 0 for way in (FOLLOWED, WIDE, MODEL) for rows in (1, 2, 4))
    assert all(seconds > 0 for seconds in costs.table().values()) and {PLAIN, ALONE} <= {way for way, _ in costs.table()}
