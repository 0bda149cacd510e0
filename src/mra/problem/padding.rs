//! Which tokens a mask of pairs removes altogether (docs/definitions.md, section 2: what a mask says decides, not how it is written).

use std::ops::Range;
use std::sync::Arc;

use super::blocks::Blocks;
use super::mask::{BIASED, Bias, Mask};
use super::options::Options;
use super::segment::Place;
use crate::exec::{Chunks, threads};
use crate::kernels::ExtendMask;
use crate::simd::{Level, Scalar};

/// What a mask of pairs says of tokens.
pub(crate) struct Padding {
    /// The keys that some query sees in some head.
    pub(crate) seen_keys: Vec<bool>,
    /// Queries that see no key in any head.
    pub(crate) blind_queries: Vec<bool>,
    /// Whether all other queries see all of those keys: then the mask is padding, and hides no pair of valid tokens.
    pub(crate) is_all: bool,
    /// Whether the logit of some visible pair changes: a bias of nothing but 0 and `-inf` is a mask.
    pub(crate) is_biased: bool,
}

/// Queries of a task, at least: so many that to join what tasks found costs little.
const QUERIES: usize = 64;

impl Padding {
    /// Reads the mask of each sequence, if there is one: once for those that are alike. It says the same for blocks of any size.
    pub(crate) fn of_each(places: &[Place], options: &Options<'_>) -> Vec<Option<Arc<Self>>> {
        let Some(bias) = &options.bias else { return vec![None; places.len()] };
        let mut found: Vec<Option<Arc<Self>>> = Vec::with_capacity(places.len());
        for place in places {
            let known = found.first().filter(|_| place.is_like_first(places, options)).cloned();
            found.push(known.unwrap_or_else(|| Some(Arc::new(Self::find(bias, place, options)))));
        }
        found
    }

    /// Reads the mask of a sequence. Tokens that padding masks leave out are not looked at.
    fn find(bias: &Bias<'_>, place: &Place, options: &Options<'_>) -> Self {
        let (item, threads, level) = (place.batch, options.threads, options.level);
        let counting = |tokens: &Range<usize>, mask: Option<Mask<'_>>| {
            Blocks::from_first(tokens.clone(), options.block_size, |token| mask.is_none_or(|mask| mask.is_valid(item, token)))
        };
        let (queries, keys) = (&counting(&place.queries, options.query_mask), &counting(&place.keys, options.key_mask));
        let [.., query_len, key_len] = bias.shape;
        let (count, total) = (queries.total(), keys.total());
        let rows = if bias.is_same_for_queries() { count.min(1) } else { count };
        let size = QUERIES.max(rows.div_ceil(4 * threads));
        let tasks = rows.div_ceil(size);
        let (mut any, mut all) = (vec![0; tasks * total], vec![u8::MAX; tasks * total]);
        let mut blind = vec![false; rows];
        {
            let (any, all, blind) = (Chunks::new(&mut any, total), Chunks::new(&mut all, total), Chunks::new(&mut blind, 1));
            let worth = rows * bias.distinct_heads() * total / SCAN_THREAD + 1;
            threads::for_each(threads.min(worth), tasks, Vec::new, |scratch, task| {
                let rows = task * size..((task + 1) * size).min(rows);
                // SAFETY: each task has its own queries, and its own row of the others.
                let (any, all, blind) = unsafe { (any.get_mut(task), all.get_mut(task), blind.range_mut(rows.clone())) };
                Rows { bias, item, queries, keys, level }.read(rows, scratch, any, all, blind);
            });
        }
        let (any, all) = (join(&any, total, |a, b| a | b, 0), join(&all, total, u8::min, u8::MAX));
        let mut seen_keys = vec![false; key_len];
        for (number, &seen) in any.iter().enumerate() {
            seen_keys[keys.token(number)] = seen != 0;
        }
        let mut blind_queries = vec![false; query_len];
        for number in 0..count {
            blind_queries[queries.token(number)] = blind[number.min(rows - 1)];
        }
        let is_biased = bias.is_additive() && any.iter().any(|byte| byte & BIASED != 0);
        Self { seen_keys, blind_queries, is_all: any.iter().zip(&all).all(|(&any, &all)| any == 0 || all != 0), is_biased }
    }
}

/// The queries of a batch item.
struct Rows<'a> {
    bias: &'a Bias<'a>,
    item: usize,
    queries: &'a Blocks,
    keys: &'a Blocks,
    level: Level,
}

impl Rows<'_> {
    /// Takes queries into the union and the least of each key's bytes, but for those that see nothing, which become blind.
    fn read(&self, rows: Range<usize>, scratch: &mut Vec<u8>, any: &mut [u8], all: &mut [u8], blind: &mut [bool]) {
        let (bias, heads, numbers) = (self.bias, self.bias.distinct_heads(), 0..self.keys.total());
        let mut sees = false;
        for (place, number) in rows.enumerate() {
            let query = self.queries.token(number);
            let at = |head: usize| [self.item, head, query];
            let is_known = place > 0 && (0..heads).all(|head| bias.is_same_row(at(head), self.queries.token(number - 1)));
            if !is_known {
                sees = (0..heads).any(|head| any_set(bias.visible(at(head), self.keys, numbers.clone(), scratch)));
                for head in (0..heads).filter(|_| sees) {
                    let mask = bias.visible(at(head), self.keys, numbers.clone(), scratch);
                    f32::run(self.level, ExtendMask { mask, least: all, union: any });
                }
            }
            blind[place] = !sees;
        }
    }
}

/// Joins rows of bytes.
fn join(rows: &[u8], length: usize, with: impl Fn(u8, u8) -> u8, start: u8) -> Vec<u8> {
    let mut joined = vec![start; length];
    for row in rows.chunks_exact(length.max(1)) {
        joined.iter_mut().zip(row).for_each(|(joined, &byte)| *joined = with(*joined, byte));
    }
    joined
}

/// Elements of a mask that are worth a thread.
pub(super) const SCAN_THREAD: usize = 1 << 17;

/// Whether any byte is not 0, eight at a time.
pub(super) fn any_set(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<8>();
    let joined = |words: &[[u8; 8]]| words.iter().fold(0, |joined, word| joined | u64::from_ne_bytes(*word)) != 0;
    words.chunks(8).any(joined) || rest.iter().any(|&byte| byte != 0)
}

/// Whether any byte is not 0, and whether none is.
pub(super) fn any_and_all_set(bytes: &[u8]) -> (bool, bool) {
    const LOW: u64 = 0x0101_0101_0101_0101;
    let (words, rest) = bytes.as_chunks::<8>();
    let (joined, zeros) = words.iter().fold((0, 0), |(joined, zeros), word| {
        let word = u64::from_ne_bytes(*word);
        (joined | word, zeros | (word.wrapping_sub(LOW) & !word & (LOW << 7)))
    });
    (joined != 0 || rest.iter().any(|&byte| byte != 0), zeros == 0 && rest.iter().all(|&byte| byte != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_told_apart() {
        for len in [0, 1, 7, 8, 9, 33, 100] {
            assert_eq!(any_and_all_set(&vec![0; len]), (false, len == 0), "{len}");
            assert_eq!(any_and_all_set(&vec![1; len]), (len > 0, true), "{len}");
            for place in 0..len {
                let (mut one, mut none) = (vec![0; len], vec![255; len]);
                one[place] = 128;
                none[place] = 0;
                assert!(any_set(&one) && any_and_all_set(&one).0, "{place} of {len}");
                assert_eq!(any_and_all_set(&none), (len > 1, false), "{place} of {len}");
            }
        }
    }
}
