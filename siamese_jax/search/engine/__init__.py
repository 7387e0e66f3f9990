"""The parts of `siamese_jax.search.ranking`: what is exact, what is bounded, how they are combined.

rows             arrays, memory maps, device arrays and lists of them, as the rows of one gallery
request          the arguments of a search, checked
cpu              which of the following answers it: one_pass, all_distances or candidates
accelerators     the same on accelerators; approximate: by a graph index

exact            the distance of one pair, correctly rounded; order: the order of the answers
rounding         when products in float64 tell a distance to the last bit
bounds           the cheap score of all pairs, with a proven interval around the true one
operands         rows made ready for the product of bounds; blocks: the gallery's, block by block
checked_rows     rows as the rest of the package takes them

one_pass         very few queries: one pass without copies
all_distances    k is a large share of the gallery: all distances
candidates       which pairs can be among the answers, in bounded memory
device_program   the program that runs on accelerators, with the gallery split over them
approximate_index  graph indexes of other libraries
parallel         work on all cores; reused_memory: large arrays that are used again
"""
