//! Plans from and as arrays of bool: what callers and tests say of blocks and want to know of them.

use ndarray::{Array3, ArrayView2, ArrayViewMut2, Axis};

use super::block_plan::{blocks_of_row, selected};
use super::plan::{child_columns, number, row_bytes, set_bit};
use crate::error::Result;
use crate::mra::problem::{Form, Kind, Problem, Segment};

impl Problem<'_> {
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

/// The numbers that the plan of a head has for a token; `None` if every block is exact.
fn numbers_of_token(bytes: &[u8], row: usize, width: usize) -> Option<Vec<i32>> {
    (width > 0).then(|| bytes[row * width * 4..(row + 1) * width * 4].chunks_exact(4).map(number).collect())
}

fn to_i32(block: usize) -> i32 {
    i32::try_from(block).expect("fewer than 2^31 blocks")
}
