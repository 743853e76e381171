"""The papers' ablations, a file for each table or figure: `sweep(add, arguments)` makes the points and returns a
`plm.reporting.studies.Study` with the paper's numbers. Points are runs of the other experiments."""
