"""Tables of a report: the best result of a column is marked, all of them where several are equally good."""

from distlm.analysis.tables import Table


def best(table: Table) -> list[list[str]]:
    return [[row[column].text for row in table.rows if row[column].best] for column in range(len(table.head))]


def test_the_best_of_a_column_is_marked_and_ties_all() -> None:
    rows = [["LM", "18.65", "0.50", "9.0"], ["+ kNN", "16.12", "0.87", "9.0"], ["+ cache", "16.12", "-", "9.0"]]
    found = Table.of(["model", "perplexity", "recall", "step"], rows, lowest=[1], highest=[2])
    assert best(found) == [[], ["16.12", "16.12"], ["0.87"], []]
    assert [[cell.text for cell in row] for row in found.rows] == rows
    assert best(Table.of(found.head, rows, highest=[1], lowest=[2])) == [[], ["18.65"], ["0.50"], []]


def test_the_numbers_are_compared_and_not_their_texts() -> None:
    rows = [["a", "9.5 %", "1,024"], ["b", "87.0 %", "999"], ["c", "", "nan"]]
    assert best(Table.of(["", "share", "count"], rows, highest=[1, 2])) == [[], ["87.0 %"], ["1,024"]]


def test_one_number_alone_is_not_the_best() -> None:
    assert best(Table.of(["", "ppl"], [["LM", "18.65"], ["+ kNN", "-"]], lowest=[1])) == [[], []]
    assert best(Table.of(["", "ppl"], [["LM", "18.65"]], lowest=[1])) == [[], []]
