"""The parts of an exact search: what is exact, what is bounded, and how they are combined.

sources   rows of arrays, memory maps, device arrays and lists of them, as one gallery
request   the arguments of a search, checked
ways      which of the following answers it: few, dense or scan
devices   the same on accelerators; about: by a graph index

exact     the distance of one pair, correctly rounded; order: the order of the answers
rounded   when sums in float64, in any order, tell a distance to the last bit
bounds    the cheap score of all pairs, with a proven interval around the true one
sides     rows made ready for the product of bounds; blocks: the gallery's, a block at a time

few       very few queries: one pass without copies
dense     k is a large share of the gallery: all distances
scan      which pairs can be among the answers, in bounded memory
sharded   the program that runs on accelerators, with the gallery split over them
ann       graph indexes of other libraries
threads   work on all cores; arena: large arrays that are used again
"""
