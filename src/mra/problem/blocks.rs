//! The blocks of a sequence and the tokens in them.

use std::ops::Range;

/// Consecutive tokens of a tensor cut into blocks, of which the first and the last one may be short.
///
/// Only some of the tokens count: those that a padding mask leaves. They have consecutive *numbers*, and block `j` has the numbers
/// `start(j)..start(j + 1)`. A token that does not count has no number, so nothing that goes by numbers reads what it holds.
#[derive(Debug, Clone)]
pub(crate) struct Blocks {
    /// All tokens, whether they count or not.
    tokens: Range<usize>,
    /// Where block 0 begins: at the first token, behind it, or, where blocks are cut backwards from a later one, before it.
    origin: i64,
    size: usize,
    len: usize,
    /// The tokens that count, unless all do.
    listed: Option<Listed>,
}

#[derive(Debug, Clone)]
struct Listed {
    tokens: Vec<usize>,
    starts: Vec<usize>,
}

impl Blocks {
    /// All of these tokens count.
    pub(crate) fn all(tokens: Range<usize>, size: usize) -> Self {
        let (origin, len) = (to_i64(tokens.start), tokens.len().div_ceil(size));
        Self { tokens, origin, size, len, listed: None }
    }

    /// The tokens count for which `counts` is true; the first block begins at the first of them.
    pub(crate) fn from_first(tokens: Range<usize>, size: usize, counts: impl Fn(usize) -> bool) -> Self {
        let first = tokens.clone().find(|&token| counts(token)).unwrap_or(tokens.start);
        Self::listed(tokens, size, to_i64(first), counts)
    }

    /// As [`Self::from_first`], with a block boundary at `boundary` and, before it, as many blocks as the tokens there need.
    pub(crate) fn around(tokens: Range<usize>, size: usize, boundary: usize, counts: impl Fn(usize) -> bool) -> Self {
        let lead = boundary.saturating_sub(tokens.start).div_ceil(size);
        Self::listed(tokens, size, to_i64(boundary) - to_i64(lead * size), counts)
    }

    fn listed(tokens: Range<usize>, size: usize, origin: i64, counts: impl Fn(usize) -> bool) -> Self {
        let counting: Vec<usize> = tokens.clone().filter(|&token| counts(token)).collect();
        if counting.len() == tokens.len() && origin == to_i64(tokens.start) {
            return Self::all(tokens, size);
        }
        let end = counting.last().map_or(0, |&last| last + 1);
        let covered = usize::try_from(to_i64(end) - origin).unwrap_or(0);
        // One block even if it is empty: the tokens that do not count lie in some block.
        let len = if tokens.is_empty() { 0 } else { covered.div_ceil(size).max(1) };
        let starts = (0..=len).map(|block| {
            let first = origin + to_i64(block * size);
            counting.partition_point(|&token| to_i64(token) < first)
        });
        let starts = starts.collect();
        Self { tokens, origin, size, len, listed: Some(Listed { tokens: counting, starts }) }
    }

    /// How many blocks there are, empty ones among them.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The number of the first token of a block; for the block behind the last one, the number of all of them.
    pub(crate) fn start(&self, block: usize) -> usize {
        self.listed.as_ref().map_or_else(|| (block * self.size).min(self.tokens.len()), |listed| listed.starts[block])
    }

    /// How many tokens count.
    pub(crate) fn total(&self) -> usize {
        self.listed.as_ref().map_or(self.tokens.len(), |listed| listed.tokens.len())
    }

    /// The numbers of a block.
    pub(crate) fn numbers(&self, block: usize) -> Range<usize> {
        self.start(block)..self.start(block + 1)
    }

    /// How many tokens of a block count.
    pub(crate) fn count(&self, block: usize) -> usize {
        self.numbers(block).len()
    }

    /// How many tokens of each of some blocks count, if it is known without a look at each that they are equally many.
    pub(crate) fn count_of_each(&self, blocks: Range<usize>) -> Option<usize> {
        (self.listed.is_none() && blocks.end * self.size <= self.tokens.len()).then_some(self.size)
    }

    /// Whether all tokens count.
    pub(crate) fn are_all(&self) -> bool {
        self.listed.is_none()
    }

    /// Whether some block is empty.
    pub(crate) fn any_empty(&self) -> bool {
        self.listed.is_some() && (0..self.len).any(|block| self.count(block) == 0)
    }

    /// The numbers of those of some tokens that count.
    pub(crate) fn numbers_among(&self, tokens: &Range<usize>) -> Range<usize> {
        let place = |token: usize| self.number_at(to_i64(token) - self.origin);
        place(tokens.start)..place(tokens.end)
    }

    /// Which token has this number.
    pub(crate) fn token(&self, number: usize) -> usize {
        self.listed.as_ref().map_or(self.tokens.start + number, |listed| listed.tokens[number])
    }

    /// Whether a token counts.
    pub(crate) fn counts(&self, token: usize) -> bool {
        self.listed.as_ref().is_none_or(|listed| listed.tokens.binary_search(&token).is_ok())
    }

    /// All tokens, whether they count or not.
    pub(crate) fn tokens(&self) -> Range<usize> {
        self.tokens.clone()
    }

    /// Where block 0 begins.
    pub(crate) fn origin(&self) -> i64 {
        self.origin
    }

    /// All tokens of a block, whether they count or not. Those before the first block belong to it, and likewise behind the last.
    pub(crate) fn range(&self, block: usize) -> Range<usize> {
        let boundary = |block: usize| {
            let token = usize::try_from(self.origin + to_i64(block * self.size)).unwrap_or(0);
            token.clamp(self.tokens.start, self.tokens.end)
        };
        let start = if block == 0 { self.tokens.start } else { boundary(block) };
        let end = if block + 1 == self.len { self.tokens.end } else { boundary(block + 1) };
        start..end
    }

    /// The number of the first token at or behind this place, counted from the origin.
    pub(crate) fn number_at(&self, position: i64) -> usize {
        let token = self.origin.saturating_add(position);
        match &self.listed {
            None => usize::try_from(token - to_i64(self.tokens.start)).unwrap_or(0).min(self.tokens.len()),
            Some(listed) => {
                let block = usize::try_from(position).map_or(0, |position| (position / self.size).min(self.len));
                let (from, to) = (listed.starts[block], listed.starts[(block + 1).min(self.len)]);
                from + listed.tokens[from..to].partition_point(|&other| to_i64(other) < token)
            }
        }
    }

    /// The block of the token with this number.
    pub(crate) fn block_of(&self, number: usize) -> usize {
        let position = to_i64(self.token(number)) - self.origin;
        usize::try_from(position).expect("no token that counts lies before the origin") / self.size
    }

    /// Whether the tokens with these numbers are consecutive.
    pub(crate) fn consecutive(&self, numbers: Range<usize>) -> bool {
        numbers.is_empty() || self.token(numbers.end - 1) - self.token(numbers.start) == numbers.len() - 1
    }
}

pub(crate) fn to_i64(number: usize) -> i64 {
    i64::try_from(number).expect("fewer than 2^63 tokens")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_leaves_gaps_in_tokens_but_not_in_numbers() {
        let blocks = Blocks::from_first(0..10, 4, |token| token != 1 && token < 8);
        assert_eq!(blocks.len(), 2);
        assert_eq!((0..2).map(|j| blocks.count(j)).collect::<Vec<_>>(), [3, 4]);
        assert_eq!((0..blocks.total()).map(|n| blocks.token(n)).collect::<Vec<_>>(), [0, 2, 3, 4, 5, 6, 7]);
        assert!(!blocks.consecutive(0..3) && blocks.consecutive(1..7));
        assert_eq!((blocks.range(0), blocks.range(1)), (0..4, 4..10));
    }

    #[test]
    fn the_first_block_begins_at_the_first_token_that_counts() {
        let blocks = Blocks::from_first(5..20, 4, |token| (8..18).contains(&token));
        assert_eq!((blocks.len(), blocks.origin(), blocks.count(2)), (3, 8, 2));
        assert_eq!((blocks.range(0), blocks.range(2)), (5..12, 16..20));
        assert_eq!((blocks.number_at(-3), blocks.number_at(5), blocks.number_at(30)), (0, 5, 10));
        assert_eq!((blocks.block_of(4), blocks.token(0)), (1, 8));
        assert_eq!((blocks.numbers_among(&(5..10)), blocks.numbers_among(&(11..20))), (0..2, 3..10));
        let nothing = Blocks::from_first(5..20, 4, |_| false);
        assert_eq!((nothing.len(), nothing.total(), nothing.range(0)), (1, 0, 5..20));
    }

    #[test]
    fn blocks_are_cut_backwards_from_a_boundary() {
        let blocks = Blocks::around(5..20, 4, 11, |_| true);
        assert_eq!(blocks.len(), 5);
        assert_eq!((0..5).map(|j| blocks.count(j)).collect::<Vec<_>>(), [2, 4, 4, 4, 1]);
        assert_eq!((blocks.range(0), blocks.range(4)), (5..7, 19..20));
        assert_eq!((blocks.numbers_among(&(5..8)), blocks.numbers_among(&(8..8))), (0..3, 3..3));
    }

    #[test]
    fn the_last_block_may_be_short() {
        let blocks = Blocks::all(0..9, 4);
        assert_eq!((blocks.len(), blocks.count(2), blocks.range(2)), (3, 1, 8..9));
        assert_eq!((blocks.count_of_each(0..2), blocks.count_of_each(1..3)), (Some(4), None));
    }
}
