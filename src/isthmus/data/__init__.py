"""From files to batches: source -> Record -> Example -> Batch.

record      the two shapes of a sample            sources/    other people's files as Records
images      lazy pictures, safe opening, pixels   mix         several sources as one epoch
tokenizer   text to ids and back                  interleave  documents and few-shot prompts
text        templates, labels by construction     loader      the batches of a run, from any position
processor   Record -> Example, one per system     quarantine  bad samples, written down and counted
processors  all of them by kind                   messages    chat messages as parts of a Record
collate     Examples -> Batch                     cache       what a frozen encoder makes of each picture, on disk
"""
