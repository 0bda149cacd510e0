//! What cannot be computed with is refused, with a message that names the argument, before anything is written.

use mra_attention::{
    Bias, BiasData, BiasGradient, Budget, Coarse, Error, Gradients, Inputs, Layout, Level, Mask, Options, Problem, Result,
    Saved, Selection, Tensor, TensorMut, backward, forward, select,
};

use crate::support::{budget, options};

#[track_caller]
fn refused<T>(result: Result<T>, argument: &str) {
    let message = result.err().map(|error: Error| error.to_string()).expect("an error");
    assert!(message.starts_with(argument), "{message:?} does not start with {argument:?}");
}

const QUERY: [usize; 4] = [2, 4, 10, 8];
const KEY: [usize; 4] = [2, 2, 7, 8];

#[test]
fn tensors_lie_within_their_memory() {
    let data = [0f32; 24];
    for (shape, strides) in [
        ([1, 2, 3, 4], [24, 12, 4, 2]),
        ([1, 2, 3, 4], [24, 12, 4, 0]),
        ([1, 2, 3, 5], [24, 12, 4, 1]),
        ([2, 2, 3, 4], [1, 12, 4, 1]),
        ([2, 1, 1, 1], [usize::MAX, 1, 1, 1]),
        ([usize::MAX, 3, 1, 1], [usize::MAX, 1, 1, 1]),
    ] {
        refused(Tensor::new("value", &data, shape, strides), "value");
        refused(TensorMut::new("grad_value", &mut data.clone(), shape, strides), "grad_value");
    }
    assert!(Tensor::new("value", &data, [1, 2, 3, 4], [24, 12, 4, 1]).is_ok());
    assert!(Tensor::new("value", &data, [9, 2, 3, 1], [0, 12, 4, 7]).is_ok(), "a dimension of size 1 has no stride");
    assert!(Tensor::new("value", &data[..0], [1, 0, 3, 4], [usize::MAX, 5, 4, 3]).is_ok(), "nor has a tensor without elements");
    refused(TensorMut::new("out", &mut [0f32; 24], [2, 2, 3, 4], [0, 12, 4, 1]), "out");
    refused(Mask::new("key_mask", &[1; 13], [2, 7], [7, 1]), "key_mask");
    refused(Mask::new("key_mask", &[1; 13], [2, 7], [usize::MAX, 1]), "key_mask");
    refused(Bias::new("bias", BiasData::Bool(&[1; 41]), [1, 2, 3, 7], [42, 21, 7, 1]), "bias");
    refused(Bias::new("bias", BiasData::F64(&[0.0; 41]), [1, 2, 3, 7], [0, usize::MAX, 7, 1]), "bias");
    assert!(Bias::new("bias", BiasData::Bool(&[1; 21]), [5, 2, 3, 7], [0, 0, 7, 1]).is_ok());
}

#[test]
fn shapes_fit_each_other() {
    let new = |query, key| Problem::new(query, key, &options());
    assert!(new(QUERY, KEY).is_ok());
    refused(new(QUERY, [3, 2, 7, 8]), "key");
    refused(new(QUERY, [2, 2, 7, 9]), "key");
    refused(new(QUERY, [2, 3, 7, 8]), "key");
    refused(new(QUERY, [2, 0, 7, 8]), "key");
    refused(new(QUERY, [2, 8, 7, 8]), "key");
}

#[test]
fn options_are_meant() {
    let new = |options: &Options<'_>| Problem::new(QUERY, KEY, options).map(|_| ());
    for block_size in [0, Problem::MAX_BLOCK + 1, usize::MAX] {
        refused(new(&Options { block_size, ..options() }), "block_size");
    }
    refused(new(&Options { threads: 0, ..options() }), "threads");
    let bytes = [1; 20];
    for shape in [[2, 6], [1, 7], [7, 2], [2, 8], [0, 7]] {
        let mask = Mask::new("mask", &bytes, shape, [shape[1], 1]).unwrap();
        refused(new(&Options { key_mask: Some(mask), ..options() }), "key_mask");
        refused(new(&Options { query_mask: Some(mask), ..options() }), "query_mask");
    }
    let numbers = [0.0; 2 * 4 * 10 * 7];
    let [batch, heads, query_len, _] = QUERY;
    let fits = [batch, heads, query_len, KEY[2]];
    for shape in [[1, 4, 10, 7], [2, 2, 10, 7], [2, 4, 9, 7], [2, 4, 10, 6], [2, 4, 10, 7]] {
        let bias = Bias::new("bias", BiasData::F32(&numbers), shape, [0, 0, 0, 1]).unwrap();
        let result = new(&Options { bias: Some(bias), ..options() });
        if shape == fits { assert!(result.is_ok()) } else { refused(result, "bias") }
    }
    for dropout in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        refused(new(&Options { dropout, ..options() }), "dropout");
    }
    for softcap in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(new(&Options { softcap: Some(softcap), ..options() }), "softcap");
    }
    refused(new(&Options { softcap: Some(1.0), coarse: Coarse::FirstOrder, ..options() }), "softcap");
    for count in [0, 4, 7, 9] {
        refused(new(&Options { alibi_slopes: Some(&[0.5; 9][..count]), ..options() }), "alibi_slopes");
        refused(new(&Options { sinks: Some(&[0.5; 9][..count]), ..options() }), "sinks");
    }
    let error = Level::from_name("avx1024").unwrap_err().to_string();
    assert!(error.contains("avx1024") && error.contains("portable"), "{error}");
}

#[test]
fn budgets_are_positive() {
    let new = |budget: Budget| Problem::new(QUERY, KEY, &Options { budget, ..options() }).map(|_| ());
    for fits in
        [budget(1.0), budget(f64::INFINITY), Budget { blocks_per_row: vec![0.5, 1.0, 7.0, f64::INFINITY], ..budget(1.0) }]
    {
        assert_eq!(new(fits), Ok(()));
    }
    for blocks_per_row in [0.0, -1.0, f64::NAN, f64::NEG_INFINITY] {
        refused(new(budget(blocks_per_row)), "blocks_per_row");
        refused(new(Budget { blocks_per_row: vec![1.0, 1.0, blocks_per_row, 1.0], ..budget(1.0) }), "blocks_per_row");
    }
    for heads in [0, 2, 3, 5] {
        refused(new(Budget { blocks_per_row: vec![1.0; heads], ..budget(1.0) }), "blocks_per_row");
    }
    refused(new(Budget { num_blocks: Some(0), ..budget(1.0) }), "num_blocks");
    refused(new(Budget { local_blocks: 0, ..budget(1.0) }), "local_blocks");
}

#[test]
fn offsets_and_lengths_fit_the_batch() {
    let new = |layout| Problem::new(QUERY, KEY, &Options { layout, ..options() }).map(|_| ());
    for offsets in [&[0][..], &[3, -5]] {
        assert_eq!(new(Layout::Dense { offsets, key_lengths: Some(&[7, 0]) }), Ok(()));
    }
    for offsets in [&[][..], &[0, 0, 0]] {
        refused(new(Layout::Dense { offsets, key_lengths: None }), "offsets");
    }
    for key_lengths in [&[][..], &[7], &[7, 8], &[7, 7, 7]] {
        refused(new(Layout::Dense { offsets: &[0], key_lengths: Some(key_lengths) }), "key_lengths");
    }
}

#[test]
fn selections_have_room() {
    let (query, key) = ([0f32; 640], [0f32; 224]);
    let problem = Problem::new(QUERY, KEY, &options()).unwrap();
    let (query, key) = (contiguous(&query, QUERY), contiguous(&key, KEY));
    let mut plan = vec![0; problem.plan_bytes()];
    assert!(select(&problem, &query, &key, &mut plan).is_ok());
    refused(select(&problem, &query, &query, &mut plan), "key");
    refused(select(&problem, &key, &key, &mut plan), "query");
    refused(select(&problem, &query, &key, &mut plan[1..]), "plan");
    refused(select(&problem, &query, &key, &mut [plan.clone(), vec![0]].concat()), "plan");
}

fn strides([_, h, l, d]: [usize; 4]) -> [usize; 4] {
    [h * l * d, l * d, d, 1]
}

fn contiguous(data: &[f32], shape: [usize; 4]) -> Tensor<'_, f32> {
    Tensor::new("tensor", data, shape, strides(shape)).expect("within its memory")
}

fn contiguous_mut(data: &mut [f32], shape: [usize; 4]) -> TensorMut<'_, f32> {
    TensorMut::new("tensor", data, shape, strides(shape)).expect("within its memory")
}

/// The shapes of a call, all as they should be.
#[derive(Clone, Copy)]
struct Shapes {
    query: [usize; 4],
    key: [usize; 4],
    value: [usize; 4],
    out: [usize; 4],
    lse: [usize; 4],
    grad_out: [usize; 4],
    grad_lse: [usize; 4],
    saved_out: [usize; 4],
    saved_lse: [usize; 4],
    grad_query: [usize; 4],
    grad_key: [usize; 4],
    grad_value: [usize; 4],
}

const SHAPES: Shapes = Shapes {
    query: QUERY,
    key: KEY,
    value: [2, 2, 7, 5],
    out: [2, 4, 10, 5],
    lse: [2, 4, 10, 1],
    grad_out: [2, 4, 10, 5],
    grad_lse: [2, 4, 10, 1],
    saved_out: [2, 4, 10, 5],
    saved_lse: [2, 4, 10, 1],
    grad_query: QUERY,
    grad_key: KEY,
    grad_value: [2, 2, 7, 5],
};

/// Calls forward, both ways, and backward; checks that what is refused has written nothing.
fn call(shapes: &Shapes) -> [Result<()>; 3] {
    const UNTOUCHED: f32 = 77.0;
    const UNWRITTEN: u8 = 77;
    let zeros = [0f32; 2000];
    let problem = Problem::new(QUERY, KEY, &options()).unwrap();
    let plan = problem.plan_from(|_, _, _, block| block == 0);
    let mut chosen = vec![UNWRITTEN; problem.plan_bytes()];
    let inputs = Inputs {
        query: contiguous(&zeros, shapes.query),
        key: contiguous(&zeros, shapes.key),
        value: contiguous(&zeros, shapes.value),
    };
    let saved = Saved {
        grad_out: contiguous(&zeros, shapes.grad_out),
        grad_lse: Some(contiguous(&zeros, shapes.grad_lse)),
        out: contiguous(&zeros, shapes.saved_out),
        lse: contiguous(&zeros, shapes.saved_lse),
    };
    let mut outputs = vec![[UNTOUCHED; 2000]; 5];
    let [out, lse, grad_query, grad_key, grad_value] = &mut outputs[..] else { unreachable!("five outputs") };
    let (mut out, mut lse) = (contiguous_mut(out, shapes.out), contiguous_mut(lse, shapes.lse));
    let mut gradients = Gradients {
        query: contiguous_mut(grad_query, shapes.grad_query),
        key: contiguous_mut(grad_key, shapes.grad_key),
        value: contiguous_mut(grad_value, shapes.grad_value),
        sinks: None,
        bias: None,
    };
    let results = [
        forward(&problem, &inputs, None, Selection::Given(&plan), &mut out, &mut lse),
        forward(&problem, &inputs, None, Selection::Chosen(&mut chosen), &mut out, &mut lse),
        backward(&problem, &inputs, &saved, &plan, &mut gradients),
    ];
    let untouched = |outputs: &[[f32; 2000]]| outputs.iter().flatten().all(|&x| x == UNTOUCHED);
    assert_eq!(untouched(&outputs[..2]), results[0].is_err() && results[1].is_err(), "out and lse");
    assert_eq!(untouched(&outputs[2..]), results[2].is_err(), "gradients");
    assert_eq!(chosen.iter().all(|&byte| byte == UNWRITTEN), results[1].is_err(), "the plan");
    results
}

#[test]
fn tensors_have_the_shapes_of_the_problem() {
    assert_eq!(call(&SHAPES), [Ok(()), Ok(()), Ok(())]);
    for (place, longer) in (0..4).flat_map(|place| [(place, true), (place, false)]) {
        let off = |mut shape: [usize; 4]| {
            shape[place] = if longer { shape[place] + 1 } else { shape[place] - 1 };
            shape
        };
        let inputs =
            [(Shapes { query: off(SHAPES.query), ..SHAPES }, "query"), (Shapes { key: off(SHAPES.key), ..SHAPES }, "key")];
        for (shapes, name) in inputs {
            for result in call(&shapes) {
                refused(result, name);
            }
        }
        if place < 3 {
            let shapes = Shapes { value: off(SHAPES.value), ..SHAPES };
            for result in call(&shapes) {
                refused(result, "value");
            }
        }
        for (shapes, name) in
            [(Shapes { out: off(SHAPES.out), ..SHAPES }, "out"), (Shapes { lse: off(SHAPES.lse), ..SHAPES }, "lse")]
        {
            let [with_plan, selecting, backward] = call(&shapes);
            refused(with_plan, name);
            refused(selecting, name);
            assert_eq!(backward, Ok(()));
        }
        let of_backward = [
            (Shapes { grad_out: off(SHAPES.grad_out), ..SHAPES }, "grad_out"),
            (Shapes { grad_lse: off(SHAPES.grad_lse), ..SHAPES }, "grad_lse"),
            (Shapes { saved_out: off(SHAPES.saved_out), ..SHAPES }, "out"),
            (Shapes { saved_lse: off(SHAPES.saved_lse), ..SHAPES }, "lse"),
            (Shapes { grad_query: off(SHAPES.grad_query), ..SHAPES }, "grad_query"),
            (Shapes { grad_key: off(SHAPES.grad_key), ..SHAPES }, "grad_key"),
            (Shapes { grad_value: off(SHAPES.grad_value), ..SHAPES }, "grad_value"),
        ];
        for (shapes, name) in of_backward {
            let [with_plan, selecting, backward] = call(&shapes);
            assert_eq!((with_plan, selecting), (Ok(()), Ok(())));
            refused(backward, name);
        }
    }
}

/// Before it writes the other gradients.
#[test]
fn the_gradient_of_a_bias_to_first_order_is_refused() {
    let (zeros, shape) = ([0f32; 64], [1, 1, 8, 8]);
    let bias = Bias::new("bias", BiasData::F32(&zeros), shape, [64, 64, 8, 1]).unwrap();
    let options = Options { coarse: Coarse::FirstOrder, bias: Some(bias), ..options() };
    let problem = Problem::new(shape, shape, &options).unwrap();
    let tensor = contiguous(&zeros, shape);
    let inputs = Inputs { query: tensor, key: tensor, value: tensor };
    let saved = Saved { grad_out: tensor, grad_lse: None, out: tensor, lse: contiguous(&zeros, [1, 1, 8, 1]) };
    let mut outputs = [[77f32; 64]; 4];
    let [query, key, value, of_bias] = outputs.each_mut().map(|data| contiguous_mut(data, shape));
    let mut gradients = Gradients { query, key, value, sinks: None, bias: Some(BiasGradient::F32(of_bias)) };
    refused(backward(&problem, &inputs, &saved, &vec![0; problem.plan_bytes()], &mut gradients), "plan");
    let plan = problem.plan_from(|_, _, _, _| true);
    refused(backward(&problem, &inputs, &saved, &plan, &mut gradients), "grad_bias");
    assert!(outputs.iter().flatten().all(|&x| x == 77.0));
}

/// A plan belongs to a problem: one of another size is refused, not read as if it fitted.
#[test]
fn plans_fit_the_problem() {
    let data = [0.5f32; 64];
    let inputs = {
        let tensor = contiguous(&data, [1, 1, 8, 8]);
        Inputs { query: tensor, key: tensor, value: tensor }
    };
    let problem = Problem::new([1, 1, 8, 8], [1, 1, 8, 8], &options()).unwrap();
    let plan = problem.plan_from(|_, _, _, _| true);
    let run = |plan: &[u8]| {
        let (mut out, mut lse) = ([0f32; 64], [0f32; 8]);
        let (mut out, mut lse) = (contiguous_mut(&mut out, [1, 1, 8, 8]), contiguous_mut(&mut lse, [1, 1, 8, 1]));
        forward(&problem, &inputs, None, Selection::Given(plan), &mut out, &mut lse)
    };
    assert!(run(&plan).is_ok());
    refused(run(&plan[1..]), "plan");
    refused(run(&[&plan[..], &[0]].concat()), "plan");
    refused(run(&[]), "plan");
}
