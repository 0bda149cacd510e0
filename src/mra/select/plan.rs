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

use ndarray::{Array3, ArrayView2, ArrayViewMut2, Axis};

use crate::error::{Error, Result};
use crate::mra::problem::{Batch, Budget, Form, Kind, Problem, Segment};

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

    /// A plan of given blocks of a problem with two resolutions: as [`Self::plan_from_levels`], without the level.
    ///
    /// # Panics
    /// If a sequence has more than 2^31 blocks.
    pub fn plan_from(&self, selected: impl Fn(usize, usize, usize, usize) -> bool) -> Vec<u8> {
        self.plan_from_levels(|_, segment, head, row, block| selected(segment, head, row, block))
    }

    /// A plan of given blocks: `selected(level, segment, head, row, block)`, where level 0 is the coarsest one, and a row is a block of
    /// queries in the block form and a query, counted from the first one of the segment, in the token form. Blocks that a row sees
    /// nothing of are left out, and so are those that lie in no refined block of the level above, and those for which there is no room.
    ///
    /// # Panics
    /// If a sequence has more than 2^31 blocks.
    pub fn plan_from_levels(&self, selected: impl Fn(usize, usize, usize, usize, usize) -> bool) -> Vec<u8> {
        let mut plan = vec![0; self.plan_bytes()];
        self.start_plan(&mut plan);
        let mut above: Option<Vec<Array3<bool>>> = None;
        for (index, level) in self.levels().enumerate() {
            for (at, segment) in level.segments.iter().enumerate() {
                let above = above.as_ref().map(|above| &above[at]);
                for head in 0..self.heads {
                    let wanted = |row, block| selected(index, segment.index, head, row, block);
                    match segment.form {
                        Form::Block => level.write_rows(segment, head, above, &mut plan, wanted),
                        Form::Token => level.write_tokens(segment, head, above, &mut plan, wanted),
                    }
                }
            }
            above = Some(level.is_selected(&plan, above.as_deref()));
        }
        plan
    }

    /// Writes the plan of a head in the block form; `above` says which blocks the level above refines.
    fn write_rows(
        &self,
        segment: &Segment,
        head: usize,
        above: Option<&Array3<bool>>,
        plan: &mut [u8],
        wanted: impl Fn(usize, usize) -> bool,
    ) {
        let bits = &mut plan[self.plan_range(segment, head)];
        let keys = |j: &usize| segment.keys.count(*j) > 0;
        let Some((above, children)) = above.zip(self.children()) else {
            for (i, row) in bits.chunks_exact_mut(row_bytes(segment.keys.len()).max(1)).enumerate() {
                (0..segment.keys.len()).filter(keys).filter(|&j| wanted(i, j)).for_each(|j| set_bit(row, j));
            }
            return;
        };
        let refined = above.index_axis(Axis(0), head);
        let places = refined.indexed_iter().filter(|&(_, &refined)| refined).map(|(at, _)| at);
        for ((row, column), bits) in places.zip(bits.chunks_exact_mut(children * row_bytes(children))) {
            for (child, i) in self.child_rows(segment, row) {
                let columns = child_columns(segment, column, children);
                let bits = &mut bits[child * row_bytes(children)..];
                columns.clone().filter(keys).filter(|&j| wanted(i, j)).for_each(|j| set_bit(bits, j - columns.start));
            }
        }
    }

    /// As [`Self::write_rows`] in the token form.
    fn write_tokens(
        &self,
        segment: &Segment,
        head: usize,
        above: Option<&Array3<bool>>,
        plan: &mut [u8],
        wanted: impl Fn(usize, usize) -> bool,
    ) {
        let (width, children) = (self.plan_width(segment), self.children());
        let bytes = &mut plan[self.plan_range(segment, head)];
        for (row, numbers) in bytes.chunks_exact_mut((4 * width).max(1)).enumerate() {
            let sight = self.sight(segment, head, segment.rows.tokens().start + row);
            let is_child = |j: usize| above.zip(children).is_none_or(|(above, children)| above[[head, row, j / children]]);
            let blocks = (0..segment.keys.len()).filter(|&j| sight.kind(j) == Kind::Open && is_child(j) && wanted(row, j));
            let mut blocks = blocks.map(to_i32);
            for number in numbers.chunks_exact_mut(4) {
                number.copy_from_slice(&blocks.next().unwrap_or(-1).to_le_bytes());
            }
        }
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

    /// The blocks that a plan makes exact, with those that are cut: for each segment `(H, rows, nk)`, rows as in
    /// [`Self::plan_from_levels`].
    ///
    /// # Errors
    /// If the plan is not one of this problem.
    ///
    /// # Panics
    /// If a sequence has more than 2^31 blocks.
    pub fn is_exact(&self, plan: &[u8]) -> Result<Vec<Array3<bool>>> {
        self.is_refined(plan).map(|mut levels| levels.pop().unwrap_or_default())
    }

    /// As [`Self::is_exact`], the blocks that are refined at each level, the coarsest first; at the last one they are exact.
    ///
    /// # Errors
    /// If the plan is not one of this problem.
    ///
    /// # Panics
    /// If a sequence has more than 2^31 blocks.
    pub fn is_refined(&self, plan: &[u8]) -> Result<Vec<Vec<Array3<bool>>>> {
        self.check_plan(plan)?;
        let mut levels: Vec<Vec<Array3<bool>>> = Vec::new();
        for level in self.levels() {
            let selected = level.is_selected(plan, levels.last().map(Vec::as_slice));
            levels.push(selected);
        }
        Ok(levels)
    }

    /// The blocks of this level that a plan selects, given those of the level above.
    fn is_selected(&self, plan: &[u8], above: Option<&[Array3<bool>]>) -> Vec<Array3<bool>> {
        let of_segment = |(at, segment): (usize, &Segment)| {
            let rows = match segment.form {
                Form::Block => segment.rows.len(),
                Form::Token => segment.rows.tokens().len(),
            };
            let mut selected = Array3::from_elem((self.heads, rows, segment.keys.len()), false);
            let above = above.map(|above| &above[at]);
            for head in 0..self.heads {
                let (bytes, selected) = (&plan[self.plan_range(segment, head)], selected.index_axis_mut(Axis(0), head));
                let above = above.map(|above| above.index_axis(Axis(0), head));
                match segment.form {
                    Form::Block => self.read_rows(segment, above, bytes, selected),
                    Form::Token => self.read_tokens(segment, head, above, bytes, selected),
                }
            }
            selected
        };
        self.segments.iter().enumerate().map(of_segment).collect()
    }

    fn read_rows(&self, segment: &Segment, above: Option<ArrayView2<'_, bool>>, bits: &[u8], mut to: ArrayViewMut2<'_, bool>) {
        let Some((above, children)) = above.zip(self.children()) else {
            for (i, mut row) in to.outer_iter_mut().enumerate() {
                blocks_of_row(segment, bits, i).for_each(|j| row[j] = true);
            }
            return;
        };
        let places = above.indexed_iter().filter(|&(_, &refined)| refined).map(|(at, _)| at);
        for ((row, column), bits) in places.zip(bits.chunks_exact(children * row_bytes(children))) {
            for (child, i) in self.child_rows(segment, row).filter(|&(_, i)| segment.rows.count(i) > 0) {
                let columns = child_columns(segment, column, children);
                let set = selected(bits, child, children, 0..columns.len()).map(|j| j + columns.start);
                set.filter(|&j| segment.keys.count(j) > 0).for_each(|j| to[[i, j]] = true);
            }
        }
    }

    fn read_tokens(
        &self,
        segment: &Segment,
        head: usize,
        above: Option<ArrayView2<'_, bool>>,
        bytes: &[u8],
        mut to: ArrayViewMut2<'_, bool>,
    ) {
        let children = self.children();
        for (row, mut to) in to.outer_iter_mut().enumerate() {
            let sight = self.sight(segment, head, segment.rows.tokens().start + row);
            let chosen = numbers_of_token(bytes, row, self.plan_width(segment));
            let is_child = |j: usize| above.zip(children).is_none_or(|(above, children)| above[[row, j / children]]);
            for j in 0..to.len() {
                to[j] = match sight.kind(j) {
                    Kind::Dead => false,
                    Kind::Cut => true,
                    Kind::Open => is_child(j) && chosen.as_ref().is_none_or(|chosen| chosen.contains(&to_i32(j))),
                };
            }
        }
    }
}

/// The blocks of keys of this level in a block of the level above, which has room for `children`.
pub(crate) fn child_columns(segment: &Segment, column_above: usize, children: usize) -> Range<usize> {
    column_above * children..((column_above + 1) * children).min(segment.keys.len())
}

pub(crate) fn set_bit(bits: &mut [u8], j: usize) {
    bits[j / 8] |= 1 << (j % 8);
}

/// The blocks that the bits of a head select for a row of the block form; none where no query is computed.
fn blocks_of_row<'a>(segment: &'a Segment, bits: &'a [u8], i: usize) -> impl Iterator<Item = usize> + use<'a> {
    let nk = if segment.rows.count(i) > 0 { segment.keys.len() } else { 0 };
    selected(bits, i, segment.keys.len(), 0..nk).filter(|&j| segment.keys.count(j) > 0)
}

/// The numbers that the plan of a head has for a token; `None` if every block is exact.
fn numbers_of_token(bytes: &[u8], row: usize, width: usize) -> Option<Vec<i32>> {
    (width > 0).then(|| bytes[row * width * 4..(row + 1) * width * 4].chunks_exact(4).map(number).collect())
}

fn to_i32(block: usize) -> i32 {
    i32::try_from(block).expect("fewer than 2^31 blocks")
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

/// The plan of the block form, by rows and by columns. Empty blocks are not in it.
#[derive(Debug)]
pub(crate) struct BlockPlan {
    rows: Lists,
    columns: Lists,
}

/// Lists of block indices, one after the other.
#[derive(Debug)]
struct Lists {
    offsets: Vec<usize>,
    indices: Vec<u32>,
}

impl Lists {
    fn get(&self, list: usize) -> &[u32] {
        &self.indices[self.offsets[list]..self.offsets[list + 1]]
    }
}

impl BlockPlan {
    /// Reads the plan of the segments of the block form.
    pub(crate) fn read(problem: &Problem<'_>, batch: &Batch<'_>, plan: &[u8]) -> Self {
        let mut rows = Lists { offsets: Vec::with_capacity(batch.rows() + 1), indices: Vec::new() };
        rows.offsets.push(0);
        for flat in 0..batch.flat_heads() {
            let segment = batch.segment(flat);
            let bits = &plan[problem.plan_range(segment, flat % problem.heads)];
            for i in 0..segment.rows.len() {
                let blocks = blocks_of_row(segment, bits, i);
                rows.indices.extend(blocks.map(|j| u32::try_from(j).expect("fewer than 2^32 blocks")));
                rows.offsets.push(rows.indices.len());
            }
        }
        let columns = transpose(&rows, batch);
        Self { rows, columns }
    }

    /// Reads the plan of the level below one whose batch and plan are given.
    pub(crate) fn below(level: &Problem<'_>, batch: &Batch<'_>, above: (&Batch<'_>, &Self), plan: &[u8]) -> Self {
        let ((batch_above, above), children) = (above, level.children().expect("a level below another one"));
        let mut rows = Lists { offsets: Vec::with_capacity(batch.rows() + 1), indices: Vec::new() };
        rows.offsets.push(0);
        for head in 0..batch.flat_heads() {
            let segment = batch.segment(head);
            let bits = &plan[level.plan_range(segment, head % level.heads)];
            let mut bits = bits.chunks_exact(children * row_bytes(children));
            for row_above in 0..batch_above.segment(head).rows.len() {
                let parents = above.row(batch_above, head, row_above);
                let of_parents: Vec<&[u8]> = bits.by_ref().take(parents.len()).collect();
                for (child, i) in level.child_rows(segment, row_above) {
                    for (&parent, bits) in parents.iter().zip(&of_parents).filter(|_| segment.rows.count(i) > 0) {
                        let columns = child_columns(segment, parent as usize, children);
                        let set = selected(bits, child, children, 0..columns.len()).map(|j| j + columns.start);
                        let set = set.filter(|&j| segment.keys.count(j) > 0);
                        rows.indices.extend(set.map(|j| u32::try_from(j).expect("fewer than 2^32 blocks")));
                    }
                    rows.offsets.push(rows.indices.len());
                }
            }
        }
        let columns = transpose(&rows, batch);
        Self { rows, columns }
    }

    /// The key blocks selected for a block of queries of a flat head, ascending.
    pub(crate) fn row(&self, batch: &Batch<'_>, head: usize, i: usize) -> &[u32] {
        self.rows.get(batch.row(head, i))
    }

    /// The blocks of queries of a flat head that selected a block of keys, ascending.
    pub(crate) fn column(&self, batch: &Batch<'_>, head: usize, j: usize) -> &[u32] {
        self.columns.get(column(batch, head, j))
    }

    /// How many blocks are selected, over all heads.
    pub(crate) fn num_blocks(&self) -> usize {
        self.rows.indices.len()
    }
}

/// The blocks of a range that the bits of a head select for a row, ascending.
pub(crate) fn selected(bits: &[u8], i: usize, key_blocks: usize, blocks: Range<usize>) -> impl Iterator<Item = usize> {
    let row = &bits[i * row_bytes(key_blocks)..][..row_bytes(key_blocks)];
    let first = blocks.start / 8;
    ones(&row[first..blocks.end.div_ceil(8)]).map(move |bit| first * 8 + bit).filter(move |j| blocks.contains(j))
}

/// The positions of the bits that are 1.
fn ones(bytes: &[u8]) -> impl Iterator<Item = usize> {
    bytes.chunks(8).enumerate().flat_map(|(index, chunk)| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        let mut word = u64::from_le_bytes(word);
        std::iter::from_fn(move || {
            (word != 0).then(|| {
                let bit = word.trailing_zeros() as usize;
                word &= word - 1;
                index * 64 + bit
            })
        })
    })
}

/// The index of the list of a block of keys for one flat head, rather than for a group.
fn column(batch: &Batch<'_>, head: usize, j: usize) -> usize {
    let of_group = batch.heads_of(batch.group(head));
    let blocks = batch.segment(head).keys.len();
    batch.column(batch.group(head), 0) * of_group.len() + (head - of_group.start) * blocks + j
}

/// Lists by column from lists by row: a counting sort.
fn transpose(rows: &Lists, batch: &Batch<'_>) -> Lists {
    let lists = if batch.groups() == 0 { 0 } else { batch.columns() * batch.heads_of(0).len() };
    let mut offsets = vec![0; lists + 1];
    let entries = || {
        (0..batch.flat_heads()).flat_map(move |head| {
            (0..batch.segment(head).rows.len())
                .flat_map(move |i| rows.get(batch.row(head, i)).iter().map(move |&j| (column(batch, head, j as usize), i)))
        })
    };
    entries().for_each(|(list, _)| offsets[list + 1] += 1);
    for list in 0..lists {
        offsets[list + 1] += offsets[list];
    }
    let mut next = offsets.clone();
    let mut indices = vec![0; rows.indices.len()];
    for (list, i) in entries() {
        indices[next[list]] = u32::try_from(i).expect("fewer than 2^32 blocks");
        next[list] += 1;
    }
    Lists { offsets, indices }
}
