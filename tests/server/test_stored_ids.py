"""Ids of items that clients send: whatever they are, later requests find the others."""

from mlx_dgemma.server.stored import StoredResponses


def test_an_id_that_is_no_text_hides_no_other() -> None:
    stored = StoredResponses()
    sent = [{"id": ["a"], "n": 1}, {"id": 7, "n": 2}, {"id": "fc_1", "n": 3}, {"n": 4}]
    stored.put({"id": "resp_1", "output": []}, [], sent)
    assert stored.items() == {"fc_1": {"id": "fc_1", "n": 3}}
