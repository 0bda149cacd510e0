//! The plan: which blocks are computed exactly, as bytes that a caller keeps from forward to backward.
//!
//! Selection is discontinuous, so it is made once and kept as a value: forward, backward and tests read the plan, never a threshold.
//!
//! ```text
//! for each batch item    8 bytes, of which the first one says the form; then, for each level from the coarsest one on:
//! block form, for each head and block of queries    ceil(nk / 8) bytes: block j is bit j % 8 of byte j / 8
//!     below the coarsest level, for each head and refined block of the level above, by rows, and each row of blocks in it
//!                                                   ceil(r / 8) bytes for its r blocks, likewise
//! token form, for each head and token               width little-endian int32: blocks of which it sees all keys, ascending, then -1;
//!                                                   nothing (width 0) if every block is exact
//! ```
//!
//! Blocks that a mask cuts are exact whatever the plan says, so they need no room in it. Segments follow each other in what there is
//! for their batch item; what is behind them is not used.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::mra::problem::{Budget, Form, Problem, Segment};

/// Where the plan of a level lies in that of each batch item.
#[derive(Debug, Clone, Default)]
pub(crate) struct LevelPlace {
    /// Behind the start of the item.
    start: usize,
    /// Bytes of an item, over all levels.
    item_bytes: usize,
    /// The next coarser level, if there is one: blocks are chosen among the children of those that it refines.
    above: Option<Above>,
}

/// What the plan of a level depends on of the level above.
#[derive(Debug, Clone)]
struct Above {
    block_size: usize,
    ratio: usize,
    budget: Budget,
    /// Token form: the most blocks that its plan names for a token.
    of_token: usize,
    above: Option<Box<Above>>,
}

impl Above {
    /// Block form: the most blocks of a head that are refined, where blocks of a size make `shape` rows and columns. All of them are children
    /// of refined ones, so a budget without a bound takes no more room than these need.
    fn capacity(&self, shape: &impl Fn(usize) -> (usize, usize)) -> usize {
        let (rows, columns) = shape(self.block_size);
        let handed_down = self.above.as_ref().map_or(usize::MAX, |above| {
            let children = above.block_size / self.block_size;
            above.capacity(shape).saturating_mul(children * children)
        });
        self.budget.capacity(rows, columns, self.ratio).min(handed_down)
    }
}

impl Problem<'_> {
    /// Bytes of a plan. They follow from shapes and settings alone, not from what masks hold.
    pub fn plan_bytes(&self) -> usize {
        self.batch * self.plan_place.item_bytes
    }

    /// Gives each level its place in the plan.
    pub(crate) fn place_plans(&mut self) {
        let mut places: Vec<LevelPlace> = Vec::new();
        let mut start = HEADER;
        let mut above: Option<Above> = None;
        for level in self.levels() {
            let place = LevelPlace { start, item_bytes: 0, above: above.clone() };
            start += level.level_bytes(above.as_ref());
            above = Some(Above {
                block_size: level.block_size,
                ratio: level.ratio,
                budget: level.budget.clone(),
                of_token: level.most_of_token(above.as_ref()),
                above: above.map(Box::new),
            });
            places.push(place);
        }
        for (index, place) in places.into_iter().enumerate() {
            let level = self.coarser.get_mut(index);
            let set = |level: &mut Self| {
                level.plan_place = LevelPlace { item_bytes: start, ..place };
                level.plan_starts = level.find_plan_starts();
            };
            match level {
                Some(level) => set(level),
                None => set(self),
            }
        }
    }

    /// Bytes of the plan of this level for a batch item.
    fn level_bytes(&self, above: Option<&Above>) -> usize {
        let size = self.block_size;
        let (rows, row_bytes) = match self.packed {
            // A sequence has at most two blocks more than its share, and its rows one byte more.
            Some(count) => (self.query_len / size + 2 * count, self.key_len / (8 * size) + 2),
            // One row more: padded queries in front of the first valid one are cut backwards.
            None => (self.query_len.div_ceil(size) + 1, self.key_len.div_ceil(size).div_ceil(8)),
        };
        let block = self.heads * above.map_or(rows * row_bytes, |above| self.room_for_children(above));
        let token = 4 * self.heads * self.query_len * self.width_of(self.key_len.div_ceil(size), above);
        match (self.form_is_open, &self.bias) {
            (false, _) => token,
            (true, None) => block,
            (true, Some(_)) => block + token,
        }
    }

    /// Bytes for the children of the blocks of a head that the level above refines, over all sequences of a batch item.
    fn room_for_children(&self, above: &Above) -> usize {
        let shape = |size: usize| match self.packed {
            Some(count) => (self.query_len / size + 2 * count, self.key_len / size + 2 * count),
            None => (self.query_len.div_ceil(size) + 1, self.key_len.div_ceil(size)),
        };
        above.capacity(&shape) * self.children_bytes(above)
    }

    /// Bytes for the children of a block of the level above.
    fn children_bytes(&self, above: &Above) -> usize {
        let children = above.block_size / self.block_size;
        children * row_bytes(children)
    }

    /// Room for the blocks that a token chooses among so many; 0 if every block is exact.
    fn width_of(&self, key_blocks: usize, above: Option<&Above>) -> usize {
        if self.is_everything() { 0 } else { self.most_of_token(above).min(key_blocks) }
    }

    /// Token form: the most blocks that the plan names for a token. They are children of blocks that the level above names or that are cut:
    /// by a window the first and the last one at most, by a mask any.
    fn most_of_token(&self, above: Option<&Above>) -> usize {
        let handed_down = above.filter(|_| self.bias.is_none()).map_or(usize::MAX, |above| {
            above.of_token.saturating_add(CUT_BY_WINDOW).saturating_mul(above.block_size / self.block_size)
        });
        self.budget.token_width(self.ratio).min(handed_down)
    }

    /// Checks the length of a plan.
    pub(crate) fn check_plan_length(&self, plan: &[u8]) -> Result<()> {
        let expected = self.plan_bytes();
        if plan.len() == expected {
            return Ok(());
        }
        Err(Error::new(format!("plan: {} bytes, expected {expected}", plan.len())))
    }

    /// Checks that a plan was made for the forms of this problem.
    pub(crate) fn check_plan(&self, plan: &[u8]) -> Result<()> {
        self.check_plan_length(plan)?;
        for segment in &self.segments {
            let found = plan[self.header(segment)];
            if found != tag(segment.form) {
                let form = |tag: u8| match tag {
                    BLOCK_TAG => "the block form",
                    TOKEN_TAG => "the token form",
                    _ => "no form",
                };
                return Err(Error::new(format!(
                    "plan: made for {} in batch item {}, expected {}: masks that hide other pairs make another plan",
                    form(found),
                    segment.batch,
                    form(tag(segment.form))
                )));
            }
        }
        Ok(())
    }

    /// Starts a plan: writes what [`Self::check_plan`] reads, and zeros where nothing else is written, so that equal calls give equal
    /// bytes.
    pub(crate) fn start_plan(&self, plan: &mut [u8]) {
        if self.is_ladder() {
            plan.fill(0);
            self.segments.iter().for_each(|segment| plan[self.header(segment)] = tag(segment.form));
            return;
        }
        let item = self.plan_place.item_bytes;
        for (index, segment) in self.segments.iter().enumerate() {
            let header = self.header(segment);
            if self.packed.is_none() || index == 0 {
                plan[header..header + HEADER].fill(0);
                plan[header] = tag(segment.form);
            }
            if self.packed.is_none() || index + 1 == self.segments.len() {
                let end = self.plan_starts[index] + self.heads * self.head_bytes(segment);
                plan[end..header + item].fill(0);
            }
        }
    }

    fn header(&self, segment: &Segment) -> usize {
        segment.batch * self.plan_place.item_bytes
    }

    /// How many numbers the plan has for each token of a segment of the token form.
    pub(crate) fn plan_width(&self, segment: &Segment) -> usize {
        self.width_of(segment.keys.len(), self.plan_place.above.as_ref())
    }

    /// Bytes of one head of a segment.
    fn head_bytes(&self, segment: &Segment) -> usize {
        match (segment.form, &self.plan_place.above) {
            (Form::Block, None) => segment.rows.len() * row_bytes(segment.keys.len()),
            (Form::Block, Some(above)) if self.packed.is_none() => self.room_for_children(above),
            (Form::Block, Some(above)) => {
                let (queries, keys) = (segment.rows.tokens().len(), segment.keys.tokens().len());
                above.capacity(&|size| (queries.div_ceil(size), keys.div_ceil(size))) * self.children_bytes(above)
            }
            (Form::Token, _) => segment.rows.tokens().len() * self.plan_width(segment) * 4,
        }
    }

    /// Where the plan of a head of a segment lies.
    pub(crate) fn plan_range(&self, segment: &Segment, head: usize) -> Range<usize> {
        let (start, bytes) = (self.plan_starts[segment.index], self.head_bytes(segment));
        start + head * bytes..start + (head + 1) * bytes
    }

    /// Where the plan of each segment starts.
    pub(crate) fn find_plan_starts(&self) -> Vec<usize> {
        if self.packed.is_none() {
            let LevelPlace { start, item_bytes, .. } = self.plan_place;
            return (0..self.segments.len()).map(|index| index * item_bytes + start).collect();
        }
        let starts = self.segments.iter().scan(self.plan_place.start, |next, segment| {
            let start = *next;
            *next += self.heads * self.head_bytes(segment);
            Some(start)
        });
        starts.collect()
    }

    /// How many blocks of this level a block of the level above has side by side, if there is one above.
    pub(crate) fn children(&self) -> Option<usize> {
        self.plan_place.above.as_ref().map(|above| above.block_size / self.block_size)
    }

    /// The blocks of queries of this level in a block of queries of the level above, each with its place among those that a whole block has.
    pub(crate) fn child_rows(&self, segment: &Segment, row_above: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let children = self.children().unwrap_or(1);
        // Both levels have a boundary at the first valid query, and blocks in front of it are counted backwards from there.
        let first = (row_above * children + segment.lead()).checked_sub(segment.lead().div_ceil(children) * children);
        let skipped = if first.is_some() {
            0
        } else {
            segment.lead().div_ceil(children) * children - segment.lead() - row_above * children
        };
        let rows = segment.rows.len();
        (skipped..children).map(move |child| (child, first.unwrap_or(0) + child - skipped)).take_while(move |&(_, i)| i < rows)
    }
}

/// The blocks of keys of this level in a block of the level above, which has room for `children`.
pub(crate) fn child_columns(segment: &Segment, column_above: usize, children: usize) -> Range<usize> {
    column_above * children..((column_above + 1) * children).min(segment.keys.len())
}

pub(crate) fn set_bit(bits: &mut [u8], j: usize) {
    bits[j / 8] |= 1 << (j % 8);
}

/// Bytes of a batch item before its plan.
const HEADER: usize = 8;

/// Blocks of a token of which a window hides some keys and not others, at most.
const CUT_BY_WINDOW: usize = 2;

const BLOCK_TAG: u8 = 1;
const TOKEN_TAG: u8 = 2;

fn tag(form: Form) -> u8 {
    match form {
        Form::Block => BLOCK_TAG,
        Form::Token => TOKEN_TAG,
    }
}

/// A number of the plan of a token.
pub(crate) fn number(bytes: &[u8]) -> i32 {
    i32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

/// Bytes that hold the bits of one row of blocks.
pub(crate) fn row_bytes(key_blocks: usize) -> usize {
    key_blocks.div_ceil(8)
}
