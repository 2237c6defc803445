"""Kinds of students are found by their files, and every one of them is what the protocol says."""

from jaxinfer.train import draft, student
from jaxinfer.train.student import Student


def test_a_kind_is_a_file_with_a_function():
    found = student.kinds()
    assert found["draft"] is draft and not {"student", "teacher", "distill", "rows"} & set(found)
    assert student.find("draft") is student.find("some/folder") is draft.student
    for name, module in found.items():
        assert name == "draft" or student.find(name) is module.student


def test_a_draft_model_is_a_student(school):
    assert isinstance(school.learner.student, Student)
