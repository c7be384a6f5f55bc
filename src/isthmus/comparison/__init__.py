"""Models side by side: the same questions, scores and costs; designs trained at one budget; the report page.

Only the command line and the demo, which ends with a comparison, import this package.

compare   who takes part, scores, costs     side_by_side   results as tables, plots and samples of the page
recipe    a comparison as YAML              cost           seconds, parameters, operations, memory
contest   trains every arm, then compares   curves         losses over steps
attention_pictures   what a model attended to while it answered
report/   one self-contained HTML page      library/       comparisons that come along
"""
