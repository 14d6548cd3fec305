import json

import numpy as np

import linear_datamodeling
import problems


def tiny():
    problem = problems.digits(l2=0.1, num_subsets=12)
    train, queries = ((x[:n], y[:n]) for n, (x, y) in ((40, problem.train), (5, problem.queries)))
    return problem._replace(train=train, queries=queries, masks=problem.masks[:, :40])


def test_the_exact_inverse_predicts_what_gradients_alone_do_not(tmp_path):
    problem = tiny()
    bank = problem.bank(tmp_path / "bank").run()
    trained = linear_datamodeling.train(problem, tmp_path / "run")
    found = {
        name: linear_datamodeling.evaluate(
            linear_datamodeling.METHODS[name](trained), problem, bank.masks, bank.losses("loss")
        )
        for name in ("GradientDot", "ExactInfluence")
    }
    assert linear_datamodeling.METHODS["TracIn"](trained) is None
    assert found["ExactInfluence"]["lds"] > max(0.85, found["GradientDot"]["lds"])
    low, high = found["ExactInfluence"]["query_interval"]
    assert low <= found["ExactInfluence"]["lds"] <= high
    assert json.dumps(found)
    assert np.isfinite(found["GradientDot"]["seconds"])
