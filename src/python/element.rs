//! From the dtype of a descriptor to the type of an element.

/// Calls `$body` with `$element` as the element type of a dtype.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            Dtype::F32 => {
                type $element = f32;
                $body
            }
            Dtype::F64 => {
                type $element = f64;
                $body
            }
            Dtype::Bf16 => {
                type $element = half::bf16;
                $body
            }
            Dtype::F16 => {
                type $element = half::f16;
                $body
            }
            dtype => Err(Error::new(format!("query: dtype {dtype:?}, expected a floating point type"))),
        }
    };
}
