//! The blocks of a sequence and the valid tokens in them.

use std::ops::Range;

/// A sequence cut into blocks, the last one perhaps short, with the tokens that a padding mask leaves valid.
///
/// Valid tokens are numbered through in order; block `j` has the numbers `start(j)..start(j + 1)`. A padded token has no
/// number, so nothing that goes by numbers ever reads what is stored there.
#[derive(Debug, Clone)]
pub(crate) struct Blocks {
    length: usize,
    size: usize,
    padded: Option<Valid>,
}

#[derive(Debug, Clone)]
struct Valid {
    tokens: Vec<usize>,
    starts: Vec<usize>,
}

impl Blocks {
    /// A sequence without padding.
    pub(crate) fn new(length: usize, size: usize) -> Self {
        Self { length, size, padded: None }
    }

    /// A sequence in which `valid` says which tokens count.
    pub(crate) fn with_padding(length: usize, size: usize, valid: impl Fn(usize) -> bool) -> Self {
        let tokens: Vec<usize> = (0..length).filter(|&token| valid(token)).collect();
        if tokens.len() == length {
            return Self::new(length, size);
        }
        let starts = (0..=length.div_ceil(size)).map(|block| tokens.partition_point(|&token| token < block * size)).collect();
        Self { length, size, padded: Some(Valid { tokens, starts }) }
    }

    /// How many blocks there are, with or without valid tokens.
    pub(crate) fn len(&self) -> usize {
        self.length.div_ceil(self.size)
    }

    /// The number of the first valid token of a block; for the block after the last one, the number of all of them.
    pub(crate) fn start(&self, block: usize) -> usize {
        self.padded.as_ref().map_or_else(|| (block * self.size).min(self.length), |valid| valid.starts[block])
    }

    /// How many valid tokens a block has.
    pub(crate) fn count(&self, block: usize) -> usize {
        self.start(block + 1) - self.start(block)
    }

    /// How many valid tokens each of some blocks has, if it is known without a look at each that they have equally many.
    pub(crate) fn count_of_each(&self, blocks: Range<usize>) -> Option<usize> {
        (self.padded.is_none() && blocks.end * self.size <= self.length).then_some(self.size)
    }

    /// How many blocks have a valid token.
    pub(crate) fn live(&self) -> usize {
        (0..self.len()).filter(|&block| self.count(block) > 0).count()
    }

    /// Which token has this number.
    pub(crate) fn token(&self, number: usize) -> usize {
        self.padded.as_ref().map_or(number, |valid| valid.tokens[number])
    }

    /// All tokens of a block, valid or not.
    pub(crate) fn range(&self, block: usize) -> Range<usize> {
        block * self.size..((block + 1) * self.size).min(self.length)
    }

    /// Whether the valid tokens with these numbers are consecutive tokens.
    pub(crate) fn consecutive(&self, numbers: Range<usize>) -> bool {
        numbers.is_empty() || self.token(numbers.end - 1) - self.token(numbers.start) == numbers.len() - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_leaves_gaps_in_tokens_but_not_in_numbers() {
        let blocks = Blocks::with_padding(10, 4, |token| token != 1 && token < 8);
        assert_eq!(blocks.len(), 3);
        assert_eq!((0..3).map(|j| blocks.count(j)).collect::<Vec<_>>(), [3, 4, 0]);
        assert_eq!((0..blocks.start(3)).map(|n| blocks.token(n)).collect::<Vec<_>>(), [0, 2, 3, 4, 5, 6, 7]);
        assert!(!blocks.consecutive(0..3) && blocks.consecutive(1..7));
        assert_eq!(blocks.live(), 2);
    }

    #[test]
    fn the_last_block_may_be_short() {
        let blocks = Blocks::new(9, 4);
        assert_eq!((blocks.len(), blocks.count(2), blocks.range(2)), (3, 1, 8..9));
        assert_eq!((blocks.count_of_each(0..2), blocks.count_of_each(1..3)), (Some(4), None));
    }
}
