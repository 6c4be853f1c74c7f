"""The cost table measures what it says: every policy answers every report it is sent."""

import pytest

from batchpilot.protos.batchpilot.v1 import tuner_pb2 as pb
from batchpilot.service import report_cost
from batchpilot.service.report_cost import STEPS, main, messages
from batchpilot.service.validation import check_report


@pytest.mark.parametrize("detail", [pb.DETAIL_WINDOW, pb.DETAIL_STEPS])
def test_its_reports_can_be_real(detail):
    facts = report_cost.hello(0).hello.facts
    for raw in messages(detail, 5):
        report = pb.TuneRequest.FromString(raw).report
        check_report(report, facts)
        assert len(report.steps) == (STEPS if detail == pb.DETAIL_STEPS else 0)


def test_it_prints_a_line_for_each_policy(capsys):
    assert main(["--engines", "2", "--policies", "static,learned:example@1"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["policy", "bytes", "us", "engines"]
    assert [line.split()[0] for line in lines] == ["static", "learned:example@1"]
    for line in lines:
        _, size, microseconds, _ = line.split()
        assert int(size) > 100
        assert float(microseconds) > 0
