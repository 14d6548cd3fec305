import json

import leave_one_out


def test_removals_of_a_convex_model_come_true(tmp_path, run_program):
    run_program(leave_one_out, num_removed=6, l2=0.1, output_dir=tmp_path / "run")
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["num_removed"] == 6
    # The optimum of a strictly convex objective: first order is right but for the example's share.
    assert result["pearson"] > 0.99
    assert 0.9 < result["slope"] < 1.15
    assert (tmp_path / "run" / "scatter.png").stat().st_size > 0
